// A library's functions one by one in Node, on Dawn (npm `webgpu`) with the TVM runtime that
// web-llm bundles. Request on stdin, answer on stdout, tensors in raw little-endian files.
//
// Request: {web_llm, wasm, params, folder, seconds, features?, calls: [...]}; web_llm: its index.js;
// params: a directory of convert_weight. A call: {function, args: [...], result?, save?: [...]}.
// function: of the library, or with the prefix "global:" of the runtime. An argument:
//   {file, shape, dtype}   a tensor on the device      {shape_tuple: [...]}  a ShapeTuple
//   {int: n}               an int64                    {params: true}        the parameters
//   {ref: NAME, at?, view?}  an earlier result; `at`: item of a tuple; `view`: another shape
// save: [{ref, at?, file}] copies tensors into files; the answer lists their shapes and dtypes.

import { readFile, writeFile } from "node:fs/promises";
import { register } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { create, globals } from "webgpu";
import { killAfter, readRequest } from "./chromium.mjs";

const request = await readRequest();
killAfter(request.seconds);
const said = [];
for (const level of ["log", "info", "warn", "error"]) {
  console[level] = (...words) => said.push(words.map(String).join(" "));
}

Object.assign(globalThis, globals);
const gpu = create([]);
Object.defineProperty(globalThis, "navigator", { value: { gpu }, configurable: true });
// Where web-llm fetches from is a directory here.
const folder = "http://params/";
Object.defineProperty(globalThis, "caches", {
  configurable: true,
  value: {
    open: async () => ({
      keys: async () => [],
      add: async () => {},
      match: async ({ url }) => new Response(await readFile(path.join(request.params, url.slice(folder.length)))),
    }),
  },
});

// The WASI of the bundle takes Node for CommonJS.
globalThis.__dirname = ".";
register("./expose.mjs", import.meta.url);
const { tvmjs } = await import(pathToFileURL(request.web_llm).href);

async function main() {
  const tvm = await tvmjs.instantiate(
    (await readFile(request.wasm)).buffer,
    tvmjs.createPolyfillWASI(),
    (text) => said.push(text),
  );
  const { device, adapterInfo } = await tvmjs.detectGPUDevice();
  device.addEventListener("uncapturederror", ({ error }) => said.push(`WebGPU: ${error.message}`));
  tvm.initWebGPU(device);
  const webgpu = tvm.webgpu();
  tvm.beginScope();
  const vm = tvm.createVirtualMachine(webgpu);
  await tvm.asyncLoadWebGPUPipelines(vm.getInternalModule());
  await tvm.fetchTensorCache(folder, webgpu);
  const metadata = JSON.parse(vm.getFunction("_metadata")().toString());
  const params = tvm.getParamsFromCacheByName(metadata.params.map(({ name }) => name));
  const results = new Map();

  const pick = ({ ref, at, view }) => {
    if (!results.has(ref)) throw new Error(`there is no result ${ref}`);
    let value = results.get(ref);
    if (at !== undefined) value = value.get(at);
    return view ? value.view(view) : value;
  };
  const argument = async (given) => {
    if (given.params) return params;
    if (given.ref) return pick(given);
    if (given.shape_tuple) return tvm.makeShapeTuple(given.shape_tuple);
    if (given.int !== undefined) return new tvmjs.Scalar(given.int, "int64");
    const tensor = tvm.empty(given.shape, given.dtype, webgpu);
    tensor.copyFromRawBytes(new Uint8Array(await readFile(path.join(request.folder, given.file))));
    return tensor;
  };

  const saved = {};
  for (const call of request.calls) {
    const name = call.function;
    if (name) {
      const args = [];
      for (const given of call.args) args.push(await argument(given));
      call.args.forEach((given, i) => given.name && results.set(given.name, args[i]));
      const f = name.startsWith("global:") ? tvm.getGlobalFunc(name.slice(7)) : vm.getFunction(name);
      const result = f(...args);
      if (call.result) results.set(call.result, result);
    }
    for (const wanted of call.save ?? []) {
      const tensor = pick(wanted);
      const host = tvm.empty(tensor.shape, tensor.dtype, tvm.cpu());
      host.copyFrom(tensor);
      await webgpu.sync();
      await writeFile(path.join(request.folder, wanted.file), host.toRawBytes());
      saved[wanted.file] = { shape: [...tensor.shape], dtype: tensor.dtype };
    }
  }
  return { saved, adapter: [adapterInfo.vendor, adapterInfo.architecture].join(" ") };
}

let answer;
try {
  answer = await main();
} catch (error) {
  answer = { error: String(error?.stack ?? error) };
}
process.stdout.write(JSON.stringify({ ...answer, said }), () => process.exit(0));
