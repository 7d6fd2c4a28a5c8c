// What the box is and what it does: device, memory, versions, models with their latencies, jobs.

import { call, key } from "./api.js";
import { byId, bytes, el, fill, seconds, Status } from "./dom.js";
import { Jobs } from "./jobs.js";

const EVERY = 2000;
const POINTS = 60; // of a model's curve: two minutes
const STATES = { RUNNING: "on disk, loads when asked", NOT_STARTED: "on disk", DEPLOYING: "loading", DEPLOY_FAILED: "does not load" };

export class Box {
  constructor(app, panel) {
    this.app = app;
    this.curves = new Map(); // model and capability -> answers in each step
    this.counts = new Map();
    this.status = new Status();
    this.facts = el("dl", { class: "facts-list" });
    this.memory = el("div", { class: "meters" });
    this.versions = el("dl", { class: "facts-list" });
    this.warnings = el("ul", { class: "warnings" });
    this.models = el("tbody");
    this.jobs = new Jobs((error) => this.status.show(error));
    this.underWay = el("p", { class: "hint" });
    this.noWarnings = el("p", { class: "hint", text: "None." });
    const heads = ["Name", "Does", "State", "Answers", "p50", "p90", "p99", "Last two minutes"];
    fill(panel, this.status.node,
      card("Models", el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Models" }, el("table", { class: "models" },
        el("thead", {}, el("tr", {}, heads.map((text, i) =>
          el("th", { scope: "col", text, class: i > 2 && i < 7 ? "number" : undefined })))),
        this.models))),
      el("div", { class: "cards" },
        card("Device", this.facts, this.memory),
        card("Tracking jobs", this.underWay, this.jobs.node),
        card("Warnings", this.noWarnings, this.warnings),
        card("Versions", this.versions),
      ),
    );
    document.addEventListener("visibilitychange", () => this.poll());
    app.models.changed.add(() => this.show());
  }

  activate() {
    this.poll();
  }

  restart() {}

  /** Asks now, and every two seconds while the page is visible. */
  async poll() {
    clearTimeout(this.timer);
    if (document.visibilityState !== "visible" || this.polling) return;
    this.polling = true;
    try {
      await this.read();
    } finally {
      this.polling = false;
      this.timer = setTimeout(() => this.poll(), EVERY);
    }
  }

  async read() {
    this.error = null;
    try {
      this.info = await call("GET", "v1/info");
      for (const { model, capability, count } of this.info.latency ?? []) this.count(`${model}\t${capability}`, count);
      // What was refused for its key is asked for again when there is another one.
      if (![401, 403].includes(this.app.models.error?.status) || this.refused !== key()) {
        this.refused = key();
        await this.app.models.refresh();
      }
      if (this.app.active === this) await this.jobs.read();
    } catch (error) {
      this.error = error;
    }
    this.show();
  }

  count(name, count) {
    const before = this.counts.get(name);
    this.counts.set(name, count);
    const curve = this.curves.get(name) ?? [];
    curve.push(before === undefined ? 0 : Math.max(0, count - before)); // the server may have begun anew
    this.curves.set(name, curve.slice(-POINTS));
  }

  show() {
    this.showStrip();
    if (!this.error) this.status.say("");
    else if (this.shown !== this.error.message) this.status.show(this.error);
    this.shown = this.error?.message;
    if (this.app.active !== this || !this.info) return;
    const { info } = this;
    const gpu = info.gpuInfo ?? {};
    const devices = gpu.devices ?? [];
    fill(this.facts, pairs([
      ["Accelerator", devices.length ? devices.map((device) => device.name).join(", ") : `none. ${gpu.reason ?? ""}`],
      ["CPUs", info.numCpus],
      ["Models in memory", info.modelsLoaded],
    ]));
    fill(this.memory, meters(gpu));
    fill(this.versions, pairs(Object.entries(info.versions ?? {})));
    const warnings = info.warnings ?? [];
    this.noWarnings.hidden = warnings.length > 0;
    fill(this.warnings, warnings.map((text) => el("li", { text })));
    fill(this.models, (this.app.models.list ?? []).map((model) => this.row(model, gpu)));
    const under = info.jobs?.length ?? 0;
    this.underWay.textContent = `${under || "None"} under way on this box.${this.jobs.count ? " From this browser:" : ""}`;
    this.jobs.show();
  }

  row(model, gpu) {
    const latency = (this.info.latency ?? []).find((one) => one.model === model.name && one.capability === model.capability);
    const device = deviceOf(model.name, gpu.model_to_device ?? {});
    // RUNNING is what a request may name, loaded or not.
    const state = model.loaded ? ["in memory", device].filter(Boolean).join(", ") : (STATES[model.status] ?? model.status.toLowerCase());
    return el("tr", {},
      el("th", { scope: "row", text: model.name }), el("td", { text: model.capability }),
      el("td", {}, el("span", { class: model.loaded ? "lamp on" : "lamp", "aria-hidden": "true" }), state),
      el("td", { class: "number", text: String(latency?.count ?? 0) }),
      [50, 90, 99].map((p) => el("td", { class: "number", text: seconds((latency?.[`p${p}Ms`] ?? NaN) / 1000) })),
      el("td", {}, curve(this.curves.get(`${model.name}\t${model.capability}`) ?? [])),
    );
  }

  showStrip() {
    const strip = byId("strip");
    if (this.error || !this.info) {
      fill(strip, el("span", {}, el("span", { class: "lamp off", "aria-hidden": "true" }), this.error ? this.error.message : "…"));
      return;
    }
    const { info } = this;
    const gpu = info.gpuInfo ?? {};
    byId("version").textContent = info.appVersion ?? "";
    const device = gpu.devices?.[0];
    const [used, total] = device ? deviceMemory(device) : [gpu.memory_total - gpu.memory_available, gpu.memory_total];
    fill(strip,
      el("span", {}, el("span", { class: "lamp on", "aria-hidden": "true" }), device?.name ?? `CPU, ${info.numCpus} cores`),
      Number.isFinite(used) ? el("span", { text: `${bytes(used)} of ${bytes(total)}` }) : null,
      el("span", { text: `${info.modelsLoaded} ${info.modelsLoaded === 1 ? "model" : "models"} in memory` }),
      info.jobs?.length ? el("span", { text: `${info.jobs.length} tracking` }) : null,
    );
  }
}

function card(title, ...children) {
  return el("section", { class: "card" }, el("h2", { text: title }), children);
}

function pairs(entries) {
  return entries.filter(([, value]) => value !== undefined && value !== null)
    .map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: String(value) })));
}

/** Where a model is. One that tracks goes by two names, and is in memory under one of them. */
function deviceOf(name, devices) {
  const base = (text) => text.replace(/-(video|image)$/, "");
  return Object.entries(devices).find(([other]) => base(other) === base(name))?.[1];
}

function deviceMemory(device) {
  return [device.memory_total - device.memory_free, device.memory_total];
}

/** Memory of the host and of each device, and what models may take of it. */
function meters(gpu) {
  const rows = [];
  const add = (name, used, total, more = "") => {
    if (!Number.isFinite(used) || !(total > 0)) return;
    rows.push(el("div", {},
      el("span", { text: name }),
      el("meter", { max: total, value: used, high: total * 0.9, "aria-label": name }),
      el("span", { class: "hint", text: `${bytes(used)} of ${bytes(total)}${more}` })));
  };
  add("RAM", gpu.memory_total - gpu.memory_available, gpu.memory_total);
  for (const device of gpu.devices ?? []) add(device.name, ...deviceMemory(device));
  for (const account of gpu.memory ?? []) add(`Models on ${account.device}`, account.reserved, account.budget, " that they may take");
  return rows;
}

/** Answers in the last steps as bars. */
function curve(values) {
  const most = Math.max(...values, 1);
  const canvas = el("canvas", { class: "curve", width: POINTS * 4, height: 36, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  context.fillStyle = "#3b82f6";
  values.forEach((value, i) => {
    const height = value ? Math.max(5, (value / most) * 34) : 0;
    context.fillRect((POINTS - values.length + i) * 4, 36 - height, 3, height);
  });
  return canvas;
}
