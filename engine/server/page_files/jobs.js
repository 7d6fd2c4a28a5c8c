// Tracking jobs that were started from this browser, which outlive the page.

import { call, send } from "./api.js";
import { announce, el, fill, saveBlob, seconds } from "./dom.js";

const STORE = "pixano-edge-jobs";
const MOST = 12;

/** Their ids, the latest first; the server gives a job to whoever knows its id. */
export function jobIds() {
  try {
    return JSON.parse(localStorage.getItem(STORE) ?? "[]").filter((id) => typeof id === "string");
  } catch {
    return [];
  }
}

function keep(ids) {
  localStorage.setItem(STORE, JSON.stringify(ids.slice(0, MOST)));
}

export function rememberJob(id) {
  keep([id, ...jobIds()]);
}

/** The list of these jobs: progress, cancel, and the result as a file. */
export class Jobs {
  constructor(report) {
    this.report = report; // shows an error
    this.known = new Map(); // id -> last state; one that has ended is not asked for again
    this.node = el("ul", { class: "jobs" });
  }

  get count() {
    return jobIds().length;
  }

  async read() {
    for (const id of jobIds()) {
      const before = this.known.get(id);
      if (before && before.status !== "running") continue;
      try {
        const { status, detail, metadata, processingTime } = await call("GET", `v1/jobs/${encodeURIComponent(id)}`);
        this.known.set(id, { status, detail, processingTime, ...metadata });
      } catch (error) {
        if (error.status === 404) keep(jobIds().filter((other) => other !== id)); // its time is over
        else if (error.status !== 401 && error.status !== 403) throw error;
      }
    }
  }

  show() {
    const focused = this.node.contains(document.activeElement) ? document.activeElement.dataset.job : null;
    fill(this.node, jobIds().filter((id) => this.known.has(id)).map((id) => this.row(id, this.known.get(id))));
    if (focused) this.node.querySelector(`[data-job="${CSS.escape(focused)}"]`)?.focus();
  }

  row(id, job) {
    const running = job.status === "running";
    const frames = `frame ${job.frames_done ?? 0}${job.frames_total ? ` of ${job.frames_total}` : ""}`;
    const state = running ? frames : job.status === "completed" ? `complete, ${frames}` : `${job.status}${job.detail ? `: ${job.detail}` : ""}`;
    const button = (text, label, run) => el("button", {
      type: "button", class: "quiet", text, "aria-label": `${label} ${id}`, dataset: { job: id }, on: { click: run },
    });
    return el("li", {},
      el("span", { text: `${job.model_name ?? "job"}: ${state}, ${seconds(job.processingTime)}` }),
      el("progress", { max: 1, value: job.progress ?? 0, "aria-label": `Progress of ${id}` }),
      running
        ? button("Cancel", "Cancel", () => this.act(() => this.cancel(id)))
        : job.status === "completed"
          ? button("Save", "Save the masks of", () => this.act(() => this.save(id)))
          : button("Forget", "Forget", () => this.forget(id)),
    );
  }

  async act(work) {
    try {
      await work();
    } catch (error) {
      this.report(error);
    }
  }

  async cancel(id) {
    await call("DELETE", `v1/jobs/${encodeURIComponent(id)}`);
    await this.read();
    this.show();
    announce("The job was cancelled.");
  }

  async save(id) {
    const response = await send("GET", `v1/jobs/${encodeURIComponent(id)}`);
    saveBlob(await response.blob(), `${id}.json`);
  }

  forget(id) {
    keep(jobIds().filter((other) => other !== id));
    this.show();
  }
}
