// What the box is and what it does: device, memory, versions, models with their latencies, jobs.

import { call, key, send } from "./api.js";
import { announce, byId, bytes, el, fill, seconds, Status } from "./dom.js";
import { histograms, quantile, samples } from "./metrics.js";

const EVERY = 2000;
const LATENCY = "pixano_edge_request_seconds";
const POINTS = 60; // of a model's curve: two minutes

export class Box {
  constructor(app, panel) {
    this.app = app;
    this.curves = new Map(); // model -> mean seconds of each step, null where nothing was asked
    this.before = new Map();
    this.status = new Status();
    this.facts = el("dl", { class: "facts-list" });
    this.memory = el("div", { class: "meters" });
    this.versions = el("dl", { class: "facts-list" });
    this.warnings = el("ul", { class: "warnings" });
    this.models = el("tbody");
    this.jobs = el("ul", { class: "jobs" });
    this.noJobs = el("p", { class: "hint", text: "No tracking under way." });
    this.noWarnings = el("p", { class: "hint", text: "None." });
    fill(panel, this.status.node,
      card("Models", el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Models" }, el("table", { class: "models" },
        el("thead", {}, el("tr", {}, ["Name", "Does", "State", "Requests", "p50", "p90", "p99", "Last two minutes"]
          .map((text, i) => el("th", { scope: "col", text, class: i > 2 && i < 7 ? "number" : undefined })))), this.models))),
      el("div", { class: "cards" },
      card("Device", this.facts, this.memory),
      card("Jobs", this.noJobs, this.jobs),
      card("Warnings", this.noWarnings, this.warnings),
      card("Versions", this.versions),
    ));
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
    try {
      this.info = await call("GET", "v1/info");
      this.error = null;
    } catch (error) {
      this.error = error;
    }
    if (!this.error) {
      // A list that was refused is asked for again when there is another key.
      if (this.app.models.error?.status !== 401 || this.refusedKey !== key()) {
        this.refusedKey = key();
        await this.app.models.refresh();
      }
      await this.readLatencies();
    }
    this.show();
  }

  async readLatencies() {
    try {
      const text = await (await send("GET", "v1/metrics")).text();
      this.latencies = histograms(samples(text), LATENCY, ["model"]);
    } catch (error) {
      this.latencies = new Map();
    }
    for (const [model, { count, sum }] of this.latencies) {
      const before = this.before.get(model);
      const curve = this.curves.get(model) ?? [];
      curve.push(before && count > before.count ? (sum - before.sum) / (count - before.count) : null);
      this.curves.set(model, curve.slice(-POINTS));
      this.before.set(model, { count, sum });
    }
  }

  show() {
    this.showStrip();
    if (this.error) this.status.show(this.error);
    else this.status.say("");
    if (this.app.active !== this || !this.info) return;
    const { info } = this;
    const gpu = info.gpuInfo ?? {};
    const devices = gpu.devices ?? [];
    fill(this.facts, pairs([
      ["Accelerator", devices.length ? devices.map((d) => d.name).join(", ") : `none${gpu.reason ? `: ${gpu.reason}` : ""}`],
      ["CPUs", info.numCpus],
      ["Models in memory", `${info.modelsLoaded ?? Object.keys(gpu.model_to_device ?? {}).length} of ${(info.models ?? []).length} names`],
    ]));
    fill(this.memory, meters(gpu));
    fill(this.versions, pairs(Object.entries(info.versions ?? {})));
    const warnings = info.warnings ?? [];
    this.noWarnings.hidden = warnings.length > 0;
    fill(this.warnings, warnings.map((text) => el("li", { text })));
    fill(this.models, (this.app.models.list ?? []).map((model) => this.modelRow(model, gpu)));
    this.showJobs(info.jobs ?? []);
  }

  modelRow(model, gpu) {
    // A model that tracks goes by two names, and is in memory under one of them.
    const base = (name) => name.replace(/-(video|image)$/, "");
    const same = Object.entries(gpu.model_to_device ?? {}).find(([name]) => base(name) === base(model.name));
    const device = same?.[1];
    const latency = this.latencies?.get(model.name);
    const state = device ? `in memory, ${device}` : model.status === "RUNNING" ? "on disk, loads when asked" : model.status.toLowerCase();
    return el("tr", {},
      el("th", { scope: "row", text: model.name }), el("td", { text: model.capability }),
      el("td", {}, el("span", { class: device ? "lamp on" : "lamp", "aria-hidden": "true" }), state),
      el("td", { class: "number", text: String(latency?.count ?? 0) }),
      [0.5, 0.9, 0.99].map((q) => el("td", { class: "number", text: latency ? seconds(quantile(latency, q)) : "–" })),
      el("td", {}, curve(this.curves.get(model.name) ?? [])),
    );
  }

  showJobs(jobs) {
    this.noJobs.hidden = jobs.length > 0;
    const focused = this.jobs.contains(document.activeElement) ? document.activeElement.dataset.job : null;
    fill(this.jobs, jobs.map((job) => {
      const progress = job.progress ?? (job.frames_total ? job.frames_done / job.frames_total : null);
      const bar = el("progress", { max: 1, "aria-label": `Progress of ${job.job_id ?? "a request"}` });
      if (progress !== null) bar.value = progress;
      return el("li", {},
        el("span", { text: `${job.model}: frame ${job.frames_done}${job.frames_total ? ` of ${job.frames_total}` : ""}, ${seconds(job.seconds)}` }), bar,
        job.job_id
          ? el("button", { type: "button", class: "quiet", text: "Cancel", dataset: { job: job.job_id }, "aria-label": `Cancel ${job.job_id}`, on: { click: () => this.cancel(job) } })
          : el("span", { class: "hint", text: "somebody waits for it" }),
      );
    }));
    if (focused) this.jobs.querySelector(`[data-job="${CSS.escape(focused)}"]`)?.focus();
  }

  async cancel(job) {
    try {
      await call("DELETE", `v1/jobs/${encodeURIComponent(job.job_id)}`);
      announce("The job was cancelled.");
      await this.read();
    } catch (error) {
      this.status.show(error);
    }
  }

  showStrip() {
    const strip = byId("strip");
    if (this.error || !this.info) {
      fill(strip, el("span", { class: "lamp off" }), this.error ? "No answer" : "…");
      return;
    }
    const { info } = this;
    const gpu = info.gpuInfo ?? {};
    byId("version").textContent = info.appVersion ?? "";
    const device = gpu.devices?.[0];
    const [used, total] = device
      ? [device.memory_total - device.memory_free, device.memory_total]
      : [gpu.memory_total - gpu.memory_available, gpu.memory_total];
    const loaded = Object.keys(gpu.model_to_device ?? {}).length;
    fill(strip,
      el("span", {}, el("span", { class: "lamp on", "aria-hidden": "true" }), device?.name ?? `CPU, ${info.numCpus} cores`),
      Number.isFinite(used) ? el("span", { text: `${bytes(used)} of ${bytes(total)}` }) : null,
      el("span", { text: `${loaded} ${loaded === 1 ? "model" : "models"} in memory` }),
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

/** Memory of the host and of each device, with what models may take of it. */
function meters(gpu) {
  const rows = [];
  const add = (name, used, total, text) => {
    if (!Number.isFinite(used) || !(total > 0)) return;
    rows.push(el("div", {},
      el("span", { text: name }), el("meter", { max: total, value: used, high: total * 0.9, "aria-label": name }), el("span", { class: "hint", text })));
  };
  add("RAM", gpu.memory_total - gpu.memory_available, gpu.memory_total, `${bytes(gpu.memory_total - gpu.memory_available)} of ${bytes(gpu.memory_total)}`);
  for (const device of gpu.devices ?? []) {
    const used = device.memory_total - device.memory_free;
    add(device.name, used, device.memory_total, `${bytes(used)} of ${bytes(device.memory_total)}`);
  }
  for (const account of gpu.memory ?? []) {
    add(`Models on ${account.device}`, account.reserved, account.budget, `${bytes(account.reserved)} of ${bytes(account.budget)} that they may take`);
  }
  return rows;
}

/** The latencies of the last steps as bars; how high is relative to the largest. */
function curve(values) {
  const largest = Math.max(...values.map((value) => value ?? 0), 1e-9);
  const canvas = el("canvas", { class: "curve", width: POINTS * 4, height: 36, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  context.fillStyle = "#3b82f6";
  values.forEach((value, i) => {
    if (value === null) return;
    const height = Math.max(3, (value / largest) * 34);
    context.fillRect((POINTS - values.length + i) * 4, 36 - height, 3, height);
  });
  return canvas;
}
