// A package that `ffmerge export` wrote, run by ONNX Runtime Web.

const DIST = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
const BUNDLES = { wasm: "ort.wasm.min.mjs", webgpu: "ort.webgpu.min.mjs" };

// y = Identity(x): a first session that pays for the library's own start.
const TRIVIAL =
  "CAg6NwoQCgF4EgF5IghJZGVudGl0eRIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEBE=";

/** Return ONNX Runtime Web for a backend, "wasm" or "webgpu"; throw where there is no such device. */
export async function runtime(backend) {
  if (backend === "webgpu" && !(await navigator.gpu?.requestAdapter())) {
    throw new Error("this browser offers no WebGPU device");
  }
  const ort = await import(DIST + BUNDLES[backend]);
  ort.env.wasm.wasmPaths = DIST;
  const trivial = Uint8Array.from(atob(TRIVIAL), (letter) => letter.charCodeAt(0));
  await (await ort.InferenceSession.create(trivial, { executionProviders: [backend] })).release();
  return ort;
}

/**
 * Open the one graph of the package at `url` (ending in a slash).
 *
 * Returns its manifest, the bytes of graph and data, the milliseconds that fetching and
 * loading them took, and `run(name -> [data, dims])`, which gives name -> tensor.
 */
export async function openPackage(url, backend) {
  const ort = await runtime(backend); // not a part of the package's time
  const start = performance.now();
  const manifest = await json(url + "ffmerge.json");
  const [graph] = manifest.graphs;
  const data = manifest.files.filter((file) => file.path.endsWith(".onnx_data"));
  const [model, ...weights] = await Promise.all(
    [graph, ...data].map((file) => bytes(url + file.path)),
  );
  const session = await ort.InferenceSession.create(model, {
    executionProviders: [backend],
    externalData: data.map((file, i) => ({ path: file.path.split("/").pop(), data: weights[i] })),
  });
  return {
    manifest,
    bytes: [model, ...weights].reduce((sum, part) => sum + part.byteLength, 0),
    loadMs: performance.now() - start,
    run: (feeds) =>
      session.run(
        Object.fromEntries(
          graph.probe.inputs.map(({ name, dtype }) => [name, new ort.Tensor(dtype, ...feeds[name])]),
        ),
      ),
    close: () => session.release(),
  };
}

async function fetched(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}`);
  return answer;
}
const json = async (url) => (await fetched(url)).json();
const bytes = async (url) => new Uint8Array(await (await fetched(url)).arrayBuffer());
