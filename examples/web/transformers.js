// transformers.js, with models from packages/ beside this page and nothing from elsewhere.
import { env } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = new URL("./packages/", import.meta.url).pathname;
env.backends.onnx.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;

export * from "@huggingface/transformers";
