// Boxes of the classes that one names, and the mask in a box.

import { send, withImage } from "./api.js";
import { announce, colourOf, dot, el, field, fill, seconds, Status } from "./dom.js";
import { modelSelect } from "./models.js";
import { Mask } from "./rle.js";

const FLOOR = 0.05; // asked for; the slider then hides boxes without asking again
const START = 0.3;
const MOST = 200;

export class Detect {
  constructor(app, panel) {
    this.app = app;
    this.boxes = []; // {box, score, name, kind, mask}
    this.lit = null;
    this.status = new Status();
    this.model = modelSelect(app.models, "detection", "Model", () => this.restart());
    this.masks = modelSelect(app.models, "segmentation", "Model for masks", () => {});
    this.classes = el("textarea", { rows: 2, placeholder: "cat, remote control", on: { keydown: (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      this.find();
    } } });
    this.go = el("button", { type: "submit", class: "main", text: "Find" });
    this.bar = el("input", { type: "range", min: FLOOR, max: 1, step: 0.01, value: START, on: { input: () => this.filter() } });
    this.barText = el("output", { text: START.toFixed(2) });
    this.list = el("ul", { class: "found" });
    const bar = field("Least score", this.bar, { wide: true });
    bar.querySelector("label").append(" ", this.barText);
    fill(
      panel, el("h2", { text: "Name things, get boxes" }),
      el("form", { on: { submit: (event) => { event.preventDefault(); this.find(); } } },
        this.model,
        field("Classes, separated by commas", this.classes, { wide: true }),
        el("div", { class: "row" }, this.go),
      ),
      bar, this.status.node, this.list, this.masks,
    );
    app.models.changed.add(() => this.tell());
  }

  activate() {
    this.app.stage.use({ point: (x, y) => this.maskAt(x, y), clear: () => this.restart(), box: null });
    this.app.stage.setTool("pick");
    this.suggest();
    this.tell();
    this.draw();
  }

  restart() {
    this.abort?.abort();
    this.boxes = [];
    this.busy = false;
    this.took = "";
    this.suggest();
    this.filter();
    this.tell();
  }

  /** The words of a demo scene, unless the user wrote some: "orange cross", "striped heart". */
  suggest() {
    const words = (this.app.image?.words ?? [])
      .filter((word) => !/photographic|noisy/.test(word)) // the demo detector has no word for these
      .map((word) => word.replace(" plain ", " ").replace(/^\w+ (?=\w+ \w+$)/, ""));
    const text = [...new Set(words)].join(", ");
    if (this.classes.value === "" || this.classes.value === this.suggested) this.classes.value = this.suggested = text;
  }

  tell() {
    const missing = this.app.models.missing("detection", "detects objects");
    if (missing) this.status.note(missing);
    else if (!this.app.image) this.status.say("Choose a picture first.");
    else if (!this.boxes.length && !this.busy) this.status.say("Name what to look for, then press Find.");
    this.go.disabled = missing !== null;
    this.masks.hidden = this.app.models.of("segmentation").length < 2 || !this.boxes.length;
    return !missing && this.app.image !== null;
  }

  async find() {
    if (!this.tell()) return;
    const names = this.classes.value.split(/[,\n]/).map((name) => name.trim()).filter(Boolean);
    if (!names.length) {
      this.status.show({ message: "There is no class to look for.", action: "Write one or more, separated by commas." });
      this.classes.focus();
      return;
    }
    this.abort?.abort();
    this.abort = new AbortController();
    this.boxes = [];
    this.draw();
    this.busy = true;
    this.status.busy("Looking…");
    const started = performance.now();
    try {
      const fields = { model: this.model.value, classes: names, boxThreshold: FLOOR, textThreshold: FLOOR };
      const response = await send("POST", "v1/inference/detection/binary", withImage(fields, this.app.image.file), { signal: this.abort.signal });
      const answer = await response.json();
      const { boxes, scores, classes } = answer.data;
      this.boxes = boxes
        .map((box, i) => ({ box, score: scores[i], name: classes[i], kind: Math.max(0, names.indexOf(classes[i])), mask: null }))
        .sort((a, b) => b.score - a.score)
        .slice(0, MOST);
      this.busy = false;
      this.took = `${seconds((performance.now() - started) / 1000)} (server ${seconds(answer.processingTime)})`;
      this.tell();
      this.filter();
      announce(this.status.node.textContent);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.busy = false;
      this.filter();
      this.status.show(error);
    }
  }

  get shown() {
    return this.boxes.filter((found) => found.score >= Number(this.bar.value));
  }

  filter() {
    this.barText.textContent = Number(this.bar.value).toFixed(2);
    const { shown } = this;
    this.lit = null;
    if (this.boxes.length) {
      const best = shown.length ? "" : ` The best of all has ${this.boxes[0].score.toFixed(2)}: lower the bar.`;
      this.status.say(`${shown.length} ${shown.length === 1 ? "box" : "boxes"}, ${this.took}.${best}`);
    } else if (this.took) this.status.say("Nothing was found.");
    fill(this.list, shown.map((found) => {
      const button = el("button", {
        type: "button", class: "quiet", text: "Mask", "aria-pressed": String(found.mask !== null),
        "aria-label": `Mask of ${found.name}, score ${found.score.toFixed(2)}`,
        on: { click: () => this.mask(found, button) },
      });
      found.button = button;
      const light = () => { this.lit = found; this.draw(); };
      const dim = () => { this.lit = null; this.draw(); };
      return el("li", { on: { pointerenter: light, pointerleave: dim, focusin: light, focusout: dim } },
        dot(found.kind), el("span", { class: "name", text: found.name }), el("span", { class: "score", text: found.score.toFixed(2) }), button);
    }));
    this.draw();
  }

  draw() {
    if (this.app.active !== this) return;
    const { shown } = this;
    this.app.stage.show({
      layers: shown.filter((found) => found.mask).map((found) => ({ mask: found.mask, colour: colourOf(found.kind) })),
      boxes: [...shown].reverse().map((found) => ({
        box: found.box, colour: colourOf(found.kind), text: `${found.name} ${found.score.toFixed(2)}`,
        faint: this.lit !== null && this.lit !== found, strong: this.lit === found,
      })),
    });
  }

  /** A click takes the smallest box around it. */
  maskAt(x, y) {
    const size = ({ box, score }) => ((box[2] - box[0]) * (box[3] - box[1])) / score; // of like boxes, the surer one
    const around = this.shown.filter(({ box }) => box[0] <= x && x <= box[2] && box[1] <= y && y <= box[3]);
    const found = around.sort((a, b) => size(a) - size(b))[0];
    if (found) this.mask(found, found.button);
  }

  /** Box to mask, and back. */
  async mask(found, button) {
    if (found.mask) {
      found.mask = null;
      button.setAttribute("aria-pressed", "false");
      this.draw();
      return;
    }
    const missing = this.app.models.missing("segmentation", "segments");
    if (missing) {
      this.status.show(missing);
      return;
    }
    const { image } = this.app;
    const [x1, y1, x2, y2] = found.box;
    const box = [x1, y1, Math.min(image.width - 1, x2), Math.min(image.height - 1, y2)];
    const started = performance.now();
    button.disabled = true;
    try {
      const fields = { model: this.masks.value, boxes: [box], multimaskOutput: false, numMultimaskOutputs: 1 };
      const response = await send("POST", "v1/inference/segmentation/binary", withImage(fields, image.file));
      const answer = await response.json();
      if (this.app.image !== image) return;
      found.mask = new Mask(answer.data.masks[0][0]);
      button.setAttribute("aria-pressed", "true");
      const text = `Mask of ${found.name}: ${found.mask.area.toLocaleString("en")} pixels, ${seconds((performance.now() - started) / 1000)}.`;
      this.status.say(text);
      announce(text);
    } catch (error) {
      this.status.show(error);
    } finally {
      button.disabled = false;
      this.draw();
    }
  }
}
