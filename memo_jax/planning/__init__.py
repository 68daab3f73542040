"""What a training step needs and costs on accelerators that are not at hand.

Read `plan` first, the command; `chips` has the data sheets, `hlo` reads the compiled program.
"""
