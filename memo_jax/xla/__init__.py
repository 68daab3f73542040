"""Compiler options and workarounds for XLA, and the placement of arrays on devices.

Read `compiler` first: it has compiler options and barriers. `reductions` and `products` write sums and products in the
form that compiles well. `devices` chooses a device, `flags` sets XLA's flags, and `sharding` places arrays and splits
functions. `memory` keeps memory that was freed, and `program_cache` compiled programs for the next process. Each
workaround for one backend is here, with its reason, and other packages call it by a plain name. Each has a test in
tests/xla/test_workarounds.py, the barriers of a training step in tests/training/test_step.py, that fails once the
installed jaxlib no longer needs it, and says what to delete. Those of rows marked "timed" compare speeds: `make
test-timed` runs them on a quiet machine. Two tests cannot fail that way: without a GPU, one can only see that the
workaround for GPUs is part of the program, and what gloo mixes up (tests/training/test_loss_gate.py) depends on timing.

| workaround | what XLA does without it | seen with jaxlib |
|---|---|---|
| `compiler_options`: ynn fusion type | CPU: convolutions go to a library with slow gradients (timed) | 0.10.2 |
| `compiler_options`: disabled pass | CPU: barriers are dropped before operations are fused | 0.10.2, not 0.11.2 |
| `run_once_options` | CPU: a program that runs once is optimised for longer than it runs (timed) | 0.10.2 |
| `keep_freed_memory` | CPU: the memory of each call is new, and costs a page fault every 4 KiB | 0.10.2, 0.11.2 |
| `compiler_options`: one thread | CPU: Fourier transforms deadlock, waiting for each other's threads | 0.11.2 |
| `materialize_on_cpu` | CPU: sums of residuals are recomputed in every operation that reads them | 0.10.2, 0.11.2 |
| the same | CPU: the gradients of all heads are held at once, and a schedule's cosine computed per array | 0.10.2 |
| `finish_sums_over_processes` | CPU: gloo mixes up the sums of two losses over several processes | 0.10.2 |
| `materialize_on_gpu` | GPU: the compiler aborts where a strided slice meets a product | 0.11.2 |
| `sharding.each_device_its_rows` | CPU, GPU: every device computes all rows' Fourier transforms | 0.10.2, 0.11.2 |
| `reductions` | CPU: the input of a long reduction is written to memory first | 0.10.2, 0.11.2 |
| `products.pointwise_convolution` | CPU: the gradient of a strided 1×1 convolution is slow (timed) | 0.10.2 |
"""
