"""The method: from a batch of crops to the next state, and the loop around it.

Read `step` first, which opens with the objective; then `losses`, `gate`, `optim` and `state`, which it is made of, and
`front_end` and `augment`, which make its input. `recipe` turns a config into these objects; `program` compiles and
places them. `positives`, with `kmeans`, finds other recordings for the teachers; `supervision` is what labels add, and
`loss_gate` leaves doubtful ones out. `inputs` checks what a run is made from, and `feed` hands each step its batch.
`train` is the loop, with `monitor`, `checkpoint` (on `saved_checkpoint`), `run_record` and `processes` beside it;
`goodput` measures where its time goes, and `profile` records single steps.
"""
