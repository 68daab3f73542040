"""What XLA is told and what its compilers do not find out by themselves.

`sharding` places arrays on devices; `compiler` has compiler options and barriers; `reductions` has sums in an order that
compiles well. A workaround for one backend is here, with its reason, and nowhere else.
"""
