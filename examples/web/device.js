// What this browser's WebGPU can do, and whether a model fits on it: asked before anything loads,
// because web-llm itself finds out only after the weights have been fetched.

const GB = 2 ** 30;
const MB = 2 ** 20;

// web-llm asks the device for these and gives up when the adapter has less.
const NEEDED = {
  maxStorageBuffersPerShaderStage: 10,
  maxComputeWorkgroupStorageSize: 32 * 1024,
  maxComputeInvocationsPerWorkgroup: 256,
  maxStorageBufferBindingSize: 128 * MB,
  maxBufferSize: 256 * MB,
};

/** A reason why nothing works, in words for people: `title`, `text`, `list`, `detail`. */
export class Problem extends Error {
  constructor(title, text, { list = [], detail = "", kind = "problem" } = {}) {
    super(`${title}: ${text}`);
    Object.assign(this, { title, text, list, detail, kind });
  }
}

export function formatBytes(bytes) {
  if (!Number.isFinite(bytes)) return "unknown";
  if (bytes >= 1e9) return `${(bytes / 1e9).toFixed(2)} GB`;
  return bytes >= 1e6 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e3).toFixed(0)} kB`;
}

/** The adapter's name, features and limits. Throws a Problem when there is no WebGPU. */
export async function inspectDevice() {
  if (!globalThis.isSecureContext) {
    throw new Problem(
      "This page is not in a secure context",
      "Browsers offer WebGPU to secure pages only. Open this page by the address that the server " +
        "printed (127.0.0.1 or localhost), or serve it over HTTPS.",
      { kind: "insecure" },
    );
  }
  if (!navigator.gpu) {
    throw new Problem(
      "This browser has no WebGPU",
      "The model runs on your graphics processor through WebGPU, and this browser does not offer it.",
      {
        kind: "no-webgpu",
        list: [
          "Use a current Chrome or Edge, Safari 26 or newer, or Firefox 141 or newer.",
          "On Linux, Chrome may need chrome://flags/#enable-unsafe-webgpu and Vulkan.",
          "A work profile or a policy can switch WebGPU off.",
        ],
      },
    );
  }
  let adapter = null;
  let detail = "requestAdapter() returned null";
  try {
    adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
  } catch (error) {
    detail = String(error);
  }
  if (!adapter) {
    throw new Problem(
      "No graphics adapter was found",
      "The browser knows WebGPU, but offers no adapter to this page.",
      {
        kind: "no-adapter",
        detail,
        list: [
          "Switch on hardware acceleration in the browser's settings and restart it.",
          "Update the graphics driver. chrome://gpu says why an adapter is blocked.",
        ],
      },
    );
  }
  const { info, limits } = adapter;
  return {
    name: [info?.description || info?.device, info?.architecture, info?.vendor].find(Boolean) || "unnamed",
    vendor: info?.vendor ?? "",
    software: Boolean(info?.isFallbackAdapter ?? adapter.isFallbackAdapter) || /swiftshader|llvmpipe/i.test(
      `${info?.architecture} ${info?.description}`,
    ),
    features: new Set(adapter.features),
    limits: Object.fromEntries(Object.keys(NEEDED).map((name) => [name, limits[name]])),
  };
}

/** Throws a Problem when the model cannot run on the device. */
export function checkFit(device, { record, about }) {
  const missing = (record.required_features ?? []).filter((name) => !device.features.has(name));
  if (missing.includes("shader-f16")) {
    throw new Problem(
      "The adapter has no 16-bit floats",
      `${about.name} (${about.quantization}) needs the WebGPU feature shader-f16, which ` +
        `${device.name} does not offer.`,
      {
        kind: "no-f16",
        list: [
          "Compile the model in a 32-bit scheme, such as q4f32_1: it runs everywhere.",
          "A newer graphics driver or another browser may offer shader-f16.",
        ],
      },
    );
  }
  if (missing.length) {
    throw new Problem(
      "The adapter lacks a feature",
      `${about.name} needs ${missing.join(", ")}, which ${device.name} does not offer.`,
      { kind: "no-feature", list: ["Compile the model without it (--target webgpu)."] },
    );
  }
  const short = Object.entries(NEEDED)
    .filter(([name, least]) => device.limits[name] < least)
    .map(([name, least]) => `${name}: ${device.limits[name]} here, ${least} needed`);
  // web-llm takes a binding size of 1 GiB, or the standard's 128 MiB when the adapter has less.
  const binding = device.limits.maxStorageBufferBindingSize >= GB ? GB : 128 * MB;
  const largest = record.buffer_size_required_bytes ?? 0;
  if (largest > binding) {
    short.push(
      `maxStorageBufferBindingSize: ${formatBytes(binding)} here, ` +
        `${formatBytes(largest)} needed by the largest tensor of ${about.name}`,
    );
  }
  if (short.length) {
    throw new Problem(
      "The adapter's limits are too small",
      `${device.name} cannot hold this model:`,
      { kind: "limits", list: short },
    );
  }
}
