// Clicks and boxes on one picture, and the masks that answer them.

import { floats, plane, send, withImage } from "./api.js";
import { announce, bytes, choice, colourOf, el, fill, saveBlob, seconds, Status } from "./dom.js";
import { modelSelect } from "./models.js";
import { Mask, paint } from "./rle.js";
import { KEYS } from "./stage.js";

const COLOUR = colourOf(0);
const SHOWN_TIMES = 6;
const THUMB = 84;

/**
 * The tool. Each click or box adds a step: its `prompt` {points, labels, box} in full, and what came for it: `masks`,
 * `scores`, `logits`, and which mask is `chosen`. So undo needs no request.
 */
export class Segment {
  constructor(app, panel) {
    this.app = app;
    this.steps = [];
    this.times = [];
    this.asked = 0;
    this.status = new Status();
    this.model = modelSelect(app.models, "segmentation", "Model", () => this.restart());
    this.tools = choice(
      "A click means",
      [
        ["add", "Include", "This belongs to the object"],
        ["remove", "Exclude", "This does not (also: right click or Shift)"],
        ["box", "Box", "Drag from corner to corner (a drag does so with any tool, but a finger then scrolls)"],
      ],
      "add",
      (tool) => app.stage.setTool(tool),
    );
    this.undoButton = el("button", { type: "button", text: "Undo", on: { click: () => this.undo() } });
    this.clearButton = el("button", { type: "button", text: "Clear", on: { click: () => this.clear() } });
    this.saveButton = el("button", { type: "button", text: "Save mask", title: "A PNG of the picture's size", on: { click: () => this.save() } });
    this.refine = el("input", { type: "checkbox", checked: true });
    this.candidates = el("div", { class: "candidates", role: "radiogroup", "aria-label": "Masks to choose from" });
    this.log = el("tbody");
    this.logTable = el(
      "table", { class: "log", hidden: true },
      el("caption", { text: "Latest requests" }),
      el("thead", {}, el("tr", {}, ["Request", "Here", "Server", "Received"].map((text) => el("th", { scope: "col", text })))),
      this.log,
    );
    fill(
      panel, el("h2", { text: "Click an object, get its mask" }), this.model, this.tools,
      el("div", { class: "row" }, this.undoButton, this.clearButton, this.saveButton),
      this.status.node, this.candidates, this.logTable,
      el("details", {},
        el("summary", { text: "Options and keys" }),
        el("label", { class: "check" }, this.refine, " Refine: send the last mask along with the next click"),
        keyTable([["1 2 3", "choose a mask"]]),
      ),
    );
    app.models.changed.add(() => this.tell());
    this.buttons();
  }

  get step() {
    return this.steps.at(-1) ?? null;
  }

  activate() {
    this.app.stage.use({
      point: (x, y, label) => this.add({ point: [x, y], label }),
      box: (box) => this.add({ box }),
      undo: () => this.undo(),
      clear: () => this.clear(),
      key: (letter) => this.pick(Number(letter) - 1),
    });
    this.app.stage.setTool(this.tools.querySelector(":checked").value);
    this.draw();
    if (!this.prepared) this.prepare();
  }

  /** Another picture or model: everything begins anew. */
  restart() {
    this.abort?.abort();
    this.opening?.abort();
    this.steps = [];
    this.prepared = false;
    this.showCandidates();
    if (this.app.active === this) this.activate();
  }

  tell() {
    const missing = this.app.models.missing("segmentation", "segments");
    if (missing) this.status.note(missing);
    else if (!this.app.image) this.status.say("Choose a picture first.");
    return !missing && this.app.image !== null;
  }

  /** As Pixano does when a picture is opened: a request without prompt, so that the first click finds it encoded. */
  async prepare() {
    if (!this.tell()) return;
    const { image } = this.app;
    this.prepared = true;
    this.status.busy("Reading the picture…");
    try {
      // Not ended by the first click, which waits for the same encoding.
      this.opening = new AbortController();
      await this.request({ points: [], labels: [], box: null }, "Opening", null, this.opening);
      if (this.app.image === image && !this.steps.length) this.status.say("Ready. Click on an object, or drag a box around it.");
    } catch (error) {
      if (error.name === "AbortError") return;
      this.prepared = false;
      if (this.app.image === image) this.status.show(error);
    }
  }

  async add({ point, label, box }) {
    if (!this.tell()) return;
    const before = this.step;
    const prompt = {
      points: [...(before?.prompt.points ?? []), ...(point ? [point] : [])],
      labels: [...(before?.prompt.labels ?? []), ...(point ? [label] : [])],
      box: box ?? before?.prompt.box ?? null,
    };
    const step = { prompt, masks: [], scores: [], logits: null, chosen: 0 };
    this.steps.push(step);
    this.draw();
    this.buttons();
    this.status.busy("Asking…");
    this.abort?.abort();
    this.abort = new AbortController();
    try {
      // A new box starts over: the old mask is not about it.
      const last = this.refine.checked && !box && before?.logits ? plane(before.logits, before.chosen) : null;
      const answer = await this.request(prompt, box ? "Box" : label ? "Include" : "Exclude", last, this.abort);
      step.masks = answer.data.masks[0].map((rle) => new Mask(rle));
      step.scores = [...floats(answer.data.scores)];
      step.logits = answer.data.maskLogits;
      step.chosen = step.scores.indexOf(Math.max(...step.scores));
      if (this.step === step) this.arrived(step);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.steps = this.steps.filter((other) => other !== step);
      this.status.show(error);
      this.draw();
      this.buttons();
    }
  }

  async request(prompt, what, maskInput, { signal }) {
    const { points, labels, box } = prompt;
    const fields = { model: this.model.value, numMultimaskOutputs: 1, multimaskOutput: false };
    if (points.length) Object.assign(fields, { points: [points], labels: [labels] });
    if (box && !(points.length && maskInput)) fields.boxes = [box];
    if (maskInput) fields.maskInput = maskInput;
    if (points.length || box) fields.returnLogits = true;
    // One click may mean the part or the whole: the model offers three masks.
    if (points.length === 1 && !box && !maskInput) Object.assign(fields, { multimaskOutput: true, numMultimaskOutputs: 3 });
    const started = performance.now();
    const body = withImage(fields, this.app.image.file);
    const response = await send("POST", "v1/inference/segmentation/binary", body, { signal });
    const text = await response.text();
    const answer = JSON.parse(text);
    this.timed(what, (performance.now() - started) / 1000, answer.processingTime, text.length);
    return answer;
  }

  timed(what, here, server, size) {
    this.times.push({ what, here, server, size });
    this.times = this.times.slice(-SHOWN_TIMES);
    this.logTable.hidden = false;
    fill(this.log, [...this.times].reverse().map((time) => el("tr", {},
      el("th", { scope: "row", text: time.what }),
      [seconds(time.here), seconds(time.server), bytes(time.size)].map((text) => el("td", { text })),
    )));
  }

  arrived(step) {
    this.showCandidates();
    this.draw();
    this.buttons();
    this.describe(step);
  }

  describe(step) {
    const mask = step.masks[step.chosen];
    const share = (100 * mask.area) / (mask.width * mask.height);
    const which = step.masks.length > 1 ? `Mask ${step.chosen + 1} of ${step.masks.length}` : "Mask";
    const here = this.times.at(-1)?.here;
    const text = mask.area
      ? `${which}: score ${step.scores[step.chosen].toFixed(2)}, ${mask.area.toLocaleString("en")} pixels (${share.toFixed(1)} %), ${seconds(here)}.`
      : `${which} is empty: nothing was found there. Try another point.`;
    this.status.say(text);
    announce(text);
  }

  pick(index) {
    const { step } = this;
    if (!step?.masks[index]) return false;
    step.chosen = index;
    for (const [i, button] of [...this.candidates.children].entries()) this.mark(button, i === index);
    this.draw();
    this.describe(step);
    return true;
  }

  mark(button, chosen) {
    button.setAttribute("aria-checked", String(chosen));
    button.tabIndex = chosen ? 0 : -1;
  }

  showCandidates() {
    const { step } = this;
    const masks = step && step.masks.length > 1 ? step.masks : [];
    fill(this.candidates, masks.map((mask, i) => {
      const button = el("button", {
        type: "button", role: "radio", "aria-label": `Mask ${i + 1}, score ${step.scores[i].toFixed(2)}`,
        on: { click: () => this.pick(i), keydown: (event) => this.walk(event, i, masks.length) },
      }, thumbnail(this.app.image, mask), el("span", { text: step.scores[i].toFixed(2) }));
      this.mark(button, i === step.chosen);
      return button;
    }));
  }

  walk(event, index, count) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = (index + step + count) % count;
    this.pick(next);
    this.candidates.children[next].focus();
  }

  undo() {
    if (!this.steps.length) return;
    this.abort?.abort();
    this.steps.pop();
    this.after("Undone.");
  }

  clear() {
    if (!this.steps.length) return;
    this.abort?.abort();
    this.steps = [];
    this.after("Cleared.");
  }

  after(text) {
    this.showCandidates();
    this.draw();
    this.buttons();
    if (this.step?.masks.length) this.describe(this.step);
    else this.status.say(`${text} Click on an object, or drag a box around it.`);
    announce(text);
  }

  buttons() {
    this.undoButton.disabled = this.clearButton.disabled = !this.steps.length;
    this.saveButton.disabled = !this.step?.masks.length;
  }

  draw() {
    if (this.app.active !== this) return;
    const prompt = this.step?.prompt ?? { points: [], labels: [], box: null };
    // While an answer is on its way, the last mask stays.
    const shown = [...this.steps].reverse().find((step) => step.masks.length);
    this.app.stage.show({
      layers: shown ? [{ mask: shown.masks[shown.chosen], colour: COLOUR }] : [],
      boxes: prompt.box ? [{ box: prompt.box, colour: [255, 255, 255] }] : [],
      points: prompt.points.map(([x, y], i) => ({ x, y, label: prompt.labels[i] })),
    });
  }

  save() {
    const { step } = this;
    if (step?.masks.length) saveMask(step.masks[step.chosen], this.app.image.name).catch((error) => this.status.show(error));
  }
}

/** The mask as a PNG of its own size, white on black. */
async function saveMask(mask, name) {
  const canvas = new OffscreenCanvas(mask.width, mask.height);
  const pixels = new ImageData(mask.width, mask.height);
  const inside = mask.sample();
  const words = new Uint32Array(pixels.data.buffer);
  for (let i = 0; i < words.length; i += 1) words[i] = inside[i] ? 0xffffffff : 0xff000000;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  saveBlob(await canvas.convertToBlob({ type: "image/png" }), `${name.replace(/\.[^.]*$/, "")}-mask.png`);
}

/** A small canvas of the picture with one mask. */
function thumbnail(image, mask) {
  const scale = THUMB / Math.max(image.width, image.height);
  const [width, height] = [image.width, image.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = el("canvas", { width, height, "aria-hidden": "true" });
  const layer = new OffscreenCanvas(width, height);
  layer.getContext("2d").putImageData(paint(new ImageData(width, height), [{ mask, colour: COLOUR, fill: 0.6 }], 1), 0, 0);
  const context = canvas.getContext("2d");
  context.drawImage(image.bitmap, 0, 0, width, height);
  context.drawImage(layer, 0, 0);
  return canvas;
}

/** Keys of the picture as a table, with those that one tool has in addition. */
export function keyTable(more) {
  return el("table", { class: "keys" },
    el("caption", { text: "Keys, while the picture has the focus" }),
    el("tbody", {}, [...KEYS, ...more].map(([keys, text]) =>
      el("tr", {}, el("th", { scope: "row" }, el("kbd", { text: keys })), el("td", { text })))),
  );
}
