// The models that the box serves, and the controls that choose one.

import { call } from "./api.js";
import { el, field, fill } from "./dom.js";

const EXPORT = "Export one with “pixano-edge export” and put its bundle into the server's store";
const ADVICE = {
  segmentation: `${EXPORT}, or start the server with --demo.`,
  detection: `${EXPORT}, or start the server with --demo.`,
  tracking: `${EXPORT}, or start the server with --demo.`,
  vlm: `${EXPORT}.`,
};

/** The list of models; `changed` listeners run when a name, a capability or a state in it is another one. */
export class Models {
  constructor() {
    this.list = null; // null until the first answer
    this.error = null;
    this.changed = new Set();
  }

  async refresh() {
    let list = null;
    let error = null;
    try {
      list = await call("GET", "v1/models");
    } catch (caught) {
      error = caught;
    }
    const before = this.words();
    this.list = list ?? (error.status === 0 ? this.list : null);
    this.error = error;
    if (this.words() !== before) for (const run of this.changed) run();
  }

  /** What listeners care about. Whether a model is in memory is not among it: that changes with any request. */
  words() {
    return JSON.stringify([this.list?.map(({ name, capability, status }) => [name, capability, status]), this.error?.message]);
  }

  of(capability) {
    return (this.list ?? []).filter((model) => model.capability === capability);
  }

  /** Why there is no model of this capability, as an error to show; null where there is one. */
  missing(capability, what) {
    if (this.of(capability).length) return null;
    if (this.error) return this.error;
    if (this.list === null) return { message: "Asking the box for its models…" };
    return {
      message: `This box serves no model that ${what}.`,
      action: ADVICE[capability],
    };
  }
}

/** A labelled select of the models of one capability; `value` is the name, "" for none. */
export function modelSelect(models, capability, label, onChange) {
  const select = el("select", { on: { change: () => { advise(); onChange(select.value); } } });
  const node = field(label, select, { wide: true, hint: "…" });
  const hint = node.querySelector(".hint");
  const update = () => {
    const names = models.of(capability).map((model) => model.name);
    const kept = names.includes(select.value) ? select.value : (names[0] ?? "");
    const before = select.value;
    fill(select, names.map((name) => el("option", { value: name, text: name })));
    select.value = kept;
    select.disabled = !names.length;
    advise();
    if (kept !== before) onChange(kept);
  };
  const advise = () => {
    hint.textContent = "A small model that knows drawn shapes only, for the demo scenes.";
    hint.hidden = !/^(sam2|owlv2)-demo(-video|-image)?$/.test(select.value);
  };
  models.changed.add(update);
  node.select = select;
  Object.defineProperty(node, "value", { get: () => select.value });
  return node;
}
