// Elements, words for numbers, and what screen readers are told.

/** The element of this id. */
export const byId = (id) => document.getElementById(id);

/**
 * A new element. `props`: `class`, `text`, `dataset`, `on` (event -> listener), properties of the element, and
 * attributes where the element has no such property. Children: nodes, strings, arrays of them, null for nothing.
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name === "dataset") Object.assign(node.dataset, value);
    else if (name === "on") for (const [event, run] of Object.entries(value)) node.addEventListener(event, run);
    else if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** A label and its control, in one line or, with `wide`, above each other. */
export function field(label, control, { wide = false, hint = "" } = {}) {
  control.id ||= `field-${(field.count = (field.count ?? 0) + 1)}`;
  const note = hint ? el("span", { class: "hint", text: hint, id: `${control.id}-hint` }) : null;
  if (note) control.setAttribute("aria-describedby", note.id);
  return el("div", { class: wide ? "field wide" : "field" }, el("label", { htmlFor: control.id, text: label }), control, note);
}

/** A group of radio buttons that look like one switch; `choices` are [value, label, title]. */
export function choice(legend, choices, chosen, onChange) {
  const name = `choice-${(choice.count = (choice.count ?? 0) + 1)}`;
  const inputs = choices.map(([value]) =>
    el("input", { type: "radio", name, value, checked: value === chosen, on: { change: () => onChange(value) } }),
  );
  const node = el(
    "fieldset",
    { class: "choice" },
    el("legend", { text: legend }),
    choices.map(([, label, title], i) => el("label", { title }, inputs[i], el("span", { text: label }))),
  );
  node.choose = (value) => {
    for (const input of inputs) input.checked = input.value === value;
    onChange(value);
  };
  return node;
}

/** Replaces the children of `node`. */
export function fill(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
}

/** Tells screen readers; the latest text wins. */
export function announce(text) {
  const place = byId("announcer");
  place.textContent = "";
  clearTimeout(announce.timer);
  announce.timer = setTimeout(() => (place.textContent = text), 60);
}

/**
 * Where a tool shows what it does (`busy`), what came (`say`), what is missing (`note`) and what went wrong (`show`,
 * which screen readers are told). The last two take {message, action}; what to do has a line of its own.
 */
export class Status {
  constructor() {
    this.node = el("div", { class: "status" });
  }
  say(text) {
    this.node.className = "status";
    fill(this.node, text);
  }
  busy(text) {
    this.node.className = "status busy";
    fill(this.node, text);
  }
  note(what) {
    this.put("status note", what);
  }
  /** Nothing for what the user stopped. */
  show(error) {
    if (error.name === "AbortError") return;
    this.put("status error", error);
    announce(`${error.message} ${error.action ?? ""}`);
  }
  put(style, { message, action, requestId }) {
    this.node.className = style;
    fill(
      this.node,
      el("strong", { text: message }),
      action ? el("span", { class: "action", text: action }) : null,
      requestId ? el("small", { text: `Request ${requestId}` }) : null,
    );
  }
}

/** Hands a file to the user. */
export function saveBlob(blob, name) {
  const address = URL.createObjectURL(blob);
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** Seconds as text: "84 ms", "1.32 s". */
export function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value < 0.00995) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  return value < 60 ? `${value.toFixed(2)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

/** Bytes as text, in steps of 1024. */
export function bytes(value) {
  if (!Number.isFinite(value)) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let step = 0;
  while (value >= 1024 && step < units.length - 1) {
    value /= 1024;
    step += 1;
  }
  return `${step === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[step]}`;
}

/** Colours of masks and boxes: those of the command line's pictures. */
export const COLOURS = [
  [0, 158, 255],
  [255, 159, 0],
  [0, 200, 120],
  [232, 62, 140],
  [250, 230, 60],
  [150, 90, 255],
  [255, 94, 0],
  [86, 220, 233],
  [170, 210, 60],
];
export const colourOf = (kind) => COLOURS[kind % COLOURS.length];
export const css = ([r, g, b], alpha = 1) => `rgb(${r} ${g} ${b} / ${alpha})`;

/** A dot in the colour of a kind, beside its name. */
export function dot(kind) {
  const node = el("span", { class: "dot", "aria-hidden": "true" });
  node.style.backgroundColor = css(colourOf(kind));
  return node;
}
