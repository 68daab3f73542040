"""What XLA's compilers have to be told, and how arrays are placed on devices.

`devices` chooses a device and `sharding` places arrays; `compiler` has compiler options and barriers, `reductions` and
`products` write sums and products in the form that compiles well. Each workaround for one backend is here, with its
reason, and other packages call it by a plain name. Each has a test in
tests/xla/test_workarounds.py that fails once the installed jaxlib no longer needs it, and says what to delete; those
that compare speeds run on request. Of the one for GPUs only its presence in the program can be tested without a GPU.

| workaround | what XLA does without it | seen with |
|---|---|---|
| `compiler_options`: ynn fusion type | CPU: a library takes convolutions, slowly at gradients | jaxlib 0.10.2 |
| `compiler_options`: disabled pass | CPU: barriers are dropped before operations are fused | jaxlib 0.10.2 |
| `materialize_on_cpu` | CPU: sums of residuals are recomputed in every operation that reads them | jaxlib 0.10.2 |
| `materialize_on_gpu` | GPU: the compiler aborts where a strided slice meets a product | jaxlib 0.11.2 |
| `each_device_its_rows` | CPU, GPU: every device computes the Fourier transforms of all rows | jaxlib 0.10.2 |
| `reductions` | CPU: what a long reduction reads is written to memory first | jaxlib 0.10.2 |
| `products.pointwise_convolution` | CPU: the gradient of a strided 1×1 convolution is slow | jaxlib 0.10.2 |
"""
