// A question about the picture; the answer streams.

import { dataUri, events, orThrow, send } from "./api.js";
import { announce, el, field, fill, seconds, Status } from "./dom.js";
import { modelSelect } from "./models.js";

export class Ask {
  constructor(app, panel) {
    this.app = app;
    this.status = new Status();
    this.model = modelSelect(app.models, "vlm", "Model", () => {});
    this.question = el("textarea", { rows: 3, placeholder: "What is in this picture?", on: { keydown: (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.ask();
    } } });
    this.length = el("input", { type: "number", min: 1, max: 2048, value: 128 });
    this.heat = el("input", { type: "number", min: 0, max: 2, step: 0.1, value: 0 });
    this.withPicture = el("input", { type: "checkbox", checked: true });
    this.go = el("button", { type: "submit", class: "main", text: "Ask" });
    this.stop = el("button", { type: "button", text: "Stop", disabled: true, on: { click: () => this.abort?.abort() } });
    this.hints = el("div", { class: "row", role: "group", "aria-label": "To try" });
    this.answer = el("p", { class: "answer", hidden: true, tabIndex: 0, "aria-label": "Answer" });
    this.form = el("form", { on: { submit: (event) => { event.preventDefault(); this.ask(); } } },
      this.model,
      field("Question", this.question, { wide: true }),
      this.hints,
      el("label", { class: "check" }, this.withPicture, " Send the picture along"),
      el("div", { class: "row" }, field("At most", this.length), "tokens", field("Temperature", this.heat)),
      el("div", { class: "row" }, this.go, this.stop),
    );
    fill(panel, el("h2", { text: "Ask about the picture" }), this.form, this.status.node, this.answer);
    app.models.changed.add(() => this.tell());
  }

  activate() {
    this.app.stage.use({});
    this.app.stage.setTool("pick");
    this.app.stage.show({});
    this.tell();
  }

  /** Offers questions about the demo's picture that was just taken. */
  suggest(questions) {
    fill(this.hints, questions.map((text) => el("button", { type: "button", text, on: { click: () => {
      this.question.value = text;
      this.ask();
    } } })));
  }

  restart() {
    this.abort?.abort();
    fill(this.hints, []);
    this.answer.hidden = true;
    this.tell();
  }

  tell() {
    const missing = this.app.models.missing("vlm", "answers questions (a vision-language model)");
    this.form.hidden = missing !== null;
    if (missing) this.status.note(missing);
    else if (!this.abort && this.answer.hidden) this.status.say(this.app.image ? "Ctrl + Enter asks, too." : "Choose a picture, or ask without one.");
    return !missing;
  }

  async ask() {
    const prompt = this.question.value.trim();
    if (!this.tell() || this.abort) return;
    if (!prompt) {
      this.status.show({ message: "There is no question.", action: "Write one above." });
      this.question.focus();
      return;
    }
    const images = this.withPicture.checked && this.app.image ? [await dataUri(this.app.image.file)] : null;
    const body = {
      model: this.model.value, prompt, images, maxNewTokens: Number(this.length.value) || 128, temperature: Number(this.heat.value) || 0,
    };
    const mine = (this.abort = new AbortController());
    this.go.disabled = true;
    this.stop.disabled = false;
    this.answer.hidden = false;
    this.answer.textContent = "";
    this.status.busy("Reading…");
    const started = performance.now();
    let first = null;
    let text = "";
    try {
      const response = await send("POST", "v1/inference/vlm/stream", body, { signal: mine.signal });
      for await (const event of events(response)) {
        orThrow(event);
        if (typeof event.text === "string") {
          first ??= performance.now();
          text += event.text;
          this.answer.textContent = text;
        }
        if (event.usage) this.finished(event, started, first);
      }
      this.answer.textContent = text;
      announce(text);
    } catch (error) {
      if (error.name === "AbortError") this.status.say("Stopped.");
      else this.status.show(error);
    } finally {
      if (this.abort === mine) this.abort = null;
      this.go.disabled = false;
      this.stop.disabled = true;
    }
  }

  finished({ usage }, started, first) {
    const now = performance.now();
    const rate = first && usage.completionTokens > 1 ? (1000 * (usage.completionTokens - 1)) / (now - first) : null;
    this.status.say([
      `${usage.completionTokens} tokens in ${seconds((now - started) / 1000)}`,
      first ? `the first after ${seconds((first - started) / 1000)}` : "",
      rate ? `then ${rate.toFixed(1)} per second` : "",
      `(question and picture: ${usage.promptTokens})`,
    ].filter(Boolean).join(", ").replace(", (", " ("));
  }
}
