"""A trained network at work: embeddings of recordings, and everything that is done with a network's file.

Read `embedder` first, the class that users import, then `workdir` and `model_file`, from which it loads, and `batches`,
which groups recordings by length. `network` is the function that JAX compiles, `runtime` what onnxruntime runs instead.
`embed_recordings`, `cluster`, `gallery`, `evaluate`, `export` and `convert` are the commands; `interop` has the
parameter names of other toolkits; `onnx_graph` and `onnx_file` write ONNX; `telemetry` imports onnxruntime; `hub` is
the Hub.
"""
