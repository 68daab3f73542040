"""Recordings of any form become a dataset of shards, and a dataset becomes batches of crops.

Read `recordings` first (folders, archives, Kaldi folders, TFDS: what an input holds and how it is read), then `prepare`,
which writes the dataset (`plan` shares out its work, `worker_pool` does it, `unfinished` lets it resume), then `records`
(the files of a dataset) and `batches` (crops for training). `banks` holds noise and rooms; `check` verifies a dataset.
"""
