// Official builds of ONNX Runtime send events about the device they run on, unless told not to before they are loaded.

process.env.ORT_DISABLE_TELEMETRY ??= '1';
