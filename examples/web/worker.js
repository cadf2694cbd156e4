// Runs web-llm beside the page, so that the page stays responsive and everything (GPU memory too)
// is given back by ending the worker. It also counts what WebGPU itself has no number for.

import { WebWorkerMLCEngineHandler } from "/web-llm.js";

let bytes = 0;
let peak = 0;
const sizes = new WeakMap();

if (globalThis.GPUDevice) {
  const { createBuffer } = GPUDevice.prototype;
  GPUDevice.prototype.createBuffer = function (descriptor) {
    const buffer = createBuffer.call(this, descriptor);
    sizes.set(buffer, buffer.size);
    bytes += buffer.size;
    peak = Math.max(peak, bytes);
    return buffer;
  };
  const { destroy } = GPUBuffer.prototype;
  GPUBuffer.prototype.destroy = function () {
    bytes -= sizes.get(this) ?? 0;
    sizes.delete(this);
    return destroy.call(this);
  };
  const { requestDevice } = GPUAdapter.prototype;
  GPUAdapter.prototype.requestDevice = async function (descriptor) {
    const device = await requestDevice.call(this, descriptor);
    device.lost.then(({ reason, message }) => {
      if (reason !== "destroyed") postMessage({ lost: message || "unknown reason" });
    });
    device.addEventListener("uncapturederror", ({ error }) => {
      console.error(`WebGPU: ${error.message}`);
      postMessage({ gpuError: error.message });
    });
    return device;
  };
}

let reported = -1;
setInterval(() => {
  if (bytes !== reported) postMessage({ gpu: { bytes, peak } });
  reported = bytes;
}, 500);

// A library that raises an error writes its text to the console and then traps; what reaches
// JavaScript is the trap alone. So the text is put into the error that the page gets.
const said = [];
const write = console.error.bind(console);
console.error = (...words) => {
  said.push(words.map(String).join(" "));
  if (said.length > 20) said.shift();
  write(...words);
};

class LibraryError extends Error {
  name = "LibraryError";
}

const handler = new WebWorkerMLCEngineHandler();
const handleTask = handler.handleTask.bind(handler);
handler.handleTask = (uuid, task) =>
  handleTask(uuid, async () => {
    try {
      return await task();
    } catch (error) {
      const text = said.splice(0).join("\n");
      write(error?.stack ?? String(error)); // the page gets one line of it, the console all
      if (!(error instanceof WebAssembly.RuntimeError)) throw error;
      throw new LibraryError(text || error.message, { cause: error });
    }
  });
onmessage = (event) => handler.onmessage(event);
