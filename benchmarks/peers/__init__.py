"""Other servers of models, serving what this one serves: the same ONNX file, the same vectors, the same photographs."""
