// The server's routes. Every failure is an `ApiError` that says what to do.

const KEY = "pixano-edge-key";

/** A refusal or a failure: what happened (`message`), what to do (`action`), and the HTTP status (0: no answer). */
export class ApiError extends Error {
  constructor(status, message, action = "", requestId = "") {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.action = action;
    this.requestId = requestId;
  }
}

/** The API key of this tab, "" for none. */
export const key = () => sessionStorage.getItem(KEY) ?? "";

export function setKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** Listeners for "the server wants a key" get the status: 401 without a key, 403 with a wrong one. */
export const onKeyWanted = new Set();

/**
 * Sends a request and returns the `Response` once its head is here.
 * `body`: a `FormData`, or anything that becomes JSON.
 */
export async function send(method, path, body, { signal } = {}) {
  const headers = {};
  if (key()) headers["X-API-Key"] = key();
  if (body !== undefined && !(body instanceof FormData)) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { method, headers, body, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The box does not answer.", "Check that the server runs and that this machine reaches it.");
  }
  if (response.ok) return response;
  const error = await refusal(response);
  // Without a key, 403 has another reason.
  if (response.status === 401 || (response.status === 403 && key())) for (const tell of onKeyWanted) tell(response.status);
  throw error;
}

/** `send`, and the answer's JSON. */
export async function call(method, path, body, options) {
  const response = await send(method, path, body, options);
  return response.json();
}

async function refusal(response) {
  let content = {};
  try {
    content = await response.json();
  } catch {
    // Not JSON: a proxy's own page, or a cut connection. The status says enough.
  }
  const error = content.error ?? {};
  let message = error.message ?? content.detail;
  if (Array.isArray(message)) message = message.map(fault).join("; ");
  if (typeof message !== "string" || !message) message = `The server answered ${response.status}.`;
  const action = error.action ?? ADVICE[response.status] ?? (response.status === 403 && key() ? "Enter another API key above." : "");
  if (action && message.endsWith(action)) message = message.slice(0, -action.length).trim();
  return new ApiError(response.status, message, action, error.requestId ?? response.headers.get("X-Request-ID") ?? "");
}

/** One entry of a validation error in a line: "body.points: Input should be a list". */
function fault(entry) {
  if (typeof entry === "string") return entry;
  const place = (entry.loc ?? []).filter((part) => part !== "body").join(".");
  return place ? `${place}: ${entry.msg}` : entry.msg;
}

const ADVICE = {
  401: "Enter an API key above.",
  413: "Send a smaller file, or fewer frames.",
  429: "Wait a moment, then try again.",
  503: "Wait a moment, then try again.",
  504: "Try again, or ask for less at once.",
};

/** The lines of an NDJSON answer as they come. */
export async function* lines(response) {
  for await (const line of split(response, "\n")) if (line.trim()) yield JSON.parse(line);
}

/** The data of a server-sent event stream as they come, each parsed as JSON. */
export async function* events(response) {
  for await (const block of split(response, "\n\n")) {
    const data = block
      .split("\n")
      .filter((line) => line.startsWith("data:"))
      .map((line) => line.slice(5).replace(/^ /, ""));
    if (data.length && data[0] !== "[DONE]") yield JSON.parse(data.join("\n"));
  }
}

async function* split(response, end) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      rest = (rest + value).replaceAll("\r\n", "\n");
      const parts = rest.split(end);
      rest = parts.pop();
      yield* parts;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The answer broke off.", "Check that the server still runs, then try again.");
  } finally {
    reader.cancel().catch(() => {});
  }
  if (rest.trim()) yield rest;
}

/** Throws what a stream's last event says when the work failed after the head was sent. */
export function orThrow(event) {
  if (event.error) throw new ApiError(200, event.error.message, event.error.action ?? "", event.error.requestId ?? "");
  return event;
}

/** Request with an image: the file's bytes go as they are, not as base64. */
export function withImage(fields, file) {
  const form = new FormData();
  form.append("metadata", JSON.stringify(fields));
  form.append("image", file, file.name || "image");
  return form;
}

/** A file as a ``data:`` URI. */
export function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new ApiError(0, `Cannot read ${file.name || "the file"}.`, "Choose it again."));
    reader.readAsDataURL(file);
  });
}

/** The numbers of an array as the wire has it: base64 of little-endian float32. */
export function floats(array) {
  const raw = Uint8Array.from(atob(array.data), (c) => c.charCodeAt(0));
  return new Float32Array(raw.buffer, 0, raw.length >> 2);
}

/** One of the M planes of an array [M, H, W], as an array [1, H, W]. */
export function plane(array, index) {
  const [, height, width] = array.shape.slice(-3);
  const size = height * width;
  const raw = new Uint8Array(floats(array).slice(index * size, (index + 1) * size).buffer);
  let text = "";
  for (let i = 0; i < raw.length; i += 32768) text += String.fromCharCode(...raw.subarray(i, i + 32768));
  return { shape: [1, height, width], dtype: "float32", data: btoa(text) };
}
