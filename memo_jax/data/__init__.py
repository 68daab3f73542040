"""Recordings of any form become a dataset of shards, and a dataset becomes batches of crops.

Read `recordings` first: what an input holds (folders, `archives`, `kaldi` folders, `tfds_audio`) and how it is read.
Then `prepare`, which writes a dataset (`plan` says which recordings, `worker_pool` shares out the work, `unfinished`
lets it resume), `records` (the files of a dataset) and `batches` (crops for training). `banks` reads noise and rooms;
`check` verifies a dataset; `trial_lists` makes trials of one.
"""
