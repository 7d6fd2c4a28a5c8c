// Objects marked on a frame of a clip and followed through it.

import { call, lines, orThrow, send } from "./api.js";
import { demoClip, ofFiles, ofVideo } from "./clip.js";
import { announce, byId, bytes, choice, colourOf, css, dot, el, field, fill, seconds, Status } from "./dom.js";
import { rememberJob } from "./jobs.js";
import { modelSelect } from "./models.js";
import { Mask } from "./rle.js";
import { keyTable } from "./segment.js";

const ROW = 7; // CSS pixels of an object's row in the timeline

export class Track {
  constructor(app, panel) {
    this.app = app;
    this.clip = null;
    this.index = 0;
    this.objects = []; // {id, frame, points, labels, box, preview}
    this.current = 0;
    this.tracked = new Map(); // frame -> Map(object id -> {mask, score})
    this.status = new Status();
    this.model = modelSelect(app.models, "tracking", "Model", () => this.forget());
    this.tools = choice("A click means", [
      ["add", "Include", "This belongs to the object"],
      ["remove", "Exclude", "This does not (also: right click or Shift)"],
      ["box", "Box", "Drag from corner to corner"],
    ], "add", (tool) => app.clipStage.setTool(tool));
    this.rows = el("ul", { class: "objects", "aria-label": "Objects" });
    this.more = el("button", { type: "button", text: "Another object", on: { click: () => this.addObject() } });
    this.undoButton = el("button", { type: "button", text: "Undo", on: { click: () => this.undo() } });
    this.way = el("select", {}, [["forward", "forward to the end"], ["backward", "backward to the start"], ["both", "both ways"]]
      .map(([value, text]) => el("option", { value, text })));
    this.asJob = el("input", { type: "checkbox" });
    this.go = el("button", { type: "button", class: "main", text: "Track", on: { click: () => this.run() } });
    this.stop = el("button", { type: "button", text: "Cancel", disabled: true, on: { click: () => this.cancel() } });
    this.progress = el("progress", { max: 1, value: 0, hidden: true, "aria-label": "Tracking" });
    fill(panel,
      el("h2", { text: "Mark objects, follow them" }), this.model, this.tools, this.rows,
      el("div", { class: "row" }, this.more, this.undoButton),
      field("Follow", this.way),
      el("label", { class: "check" }, this.asJob, " As a job, which goes on when this page is closed"),
      el("div", { class: "row" }, this.go, this.stop), this.progress, this.status.node,
      el("details", {}, el("summary", { text: "Keys" }), keyTable([[", .", "a frame back or on"], ["Page up, down", "ten frames on or back"]])),
    );
    this.wire();
    app.models.changed.add(() => this.tell());
    this.reset();
  }

  wire() {
    this.slider = byId("frame");
    this.slider.addEventListener("input", () => { this.follow = false; this.show(Number(this.slider.value)); });
    this.playButton = byId("play");
    this.playButton.addEventListener("click", () => this.play(!this.playing));
    byId("frame-files").addEventListener("change", (event) => {
      const files = [...event.target.files];
      event.target.value = "";
      if (files.length) this.load(() => ofFiles(files));
    });
    byId("video-file").addEventListener("change", (event) => {
      const [file] = event.target.files;
      event.target.value = "";
      if (file) this.loadVideo(file);
    });
    byId("demo-clip").addEventListener("click", () => this.load(() => demoClip(this.app.base)));
    const timeline = byId("timeline");
    timeline.addEventListener("pointerdown", (event) => {
      if (!this.clip) return;
      this.follow = false;
      this.show(Math.min(this.clip.length - 1, Math.floor((event.offsetX / timeline.clientWidth) * this.clip.length)));
    });
    new ResizeObserver(() => this.drawTimeline()).observe(timeline);
  }

  activate() {
    this.app.clipStage.use({
      point: (x, y, label) => this.mark({ point: [x, y], label }),
      box: (box) => this.mark({ box }),
      undo: () => this.undo(),
      clear: () => this.clearObject(),
      key: (letter) => this.key(letter),
    });
    this.app.clipStage.setTool(this.tools.querySelector(":checked").value);
    this.tell();
    this.draw();
    this.drawTimeline();
  }

  restart() {}

  leave() {
    this.play(false);
  }

  key(letter) {
    const step = { ",": -1, ".": 1, PageUp: 10, PageDown: -10 }[letter];
    if (!step || !this.clip) return false;
    this.follow = false;
    this.show(Math.max(0, Math.min(this.clip.length - 1, this.index + step)));
    announce(`Frame ${this.index + 1}`);
    return true;
  }

  /** Files dropped on the page: a video, or frames. */
  drop(files) {
    const video = files.find((file) => file.type.startsWith("video/"));
    if (video) this.loadVideo(video);
    else this.load(() => ofFiles(files.filter((file) => file.type.startsWith("image/"))));
  }

  loadVideo(file) {
    const fps = Math.max(1, Math.min(60, Number(byId("video-fps").value) || 10));
    this.loading?.abort();
    const mine = (this.loading = new AbortController());
    this.load(() => ofVideo(file, fps, (done, all) => this.status.busy(`Taking frame ${done} of ${all}…`), mine.signal));
  }

  async load(open) {
    this.status.busy("Opening the clip…");
    try {
      const clip = await open();
      const first = await clip.frame(0);
      this.cancel();
      this.clip?.close();
      this.clip = clip;
      this.index = 0;
      this.app.clipStage.set(first);
      this.reset();
      byId("clip-facts").textContent =
        `${clip.name}: ${clip.length} ${clip.length === 1 ? "frame" : "frames"}, ${first.width} × ${first.height}, ${bytes(clip.bytes)}`;
      this.tell();
      announce(`${clip.length} frames are open. Mark an object.`);
    } catch (error) {
      this.status.show(error);
    }
  }

  reset() {
    this.play(false);
    this.objects = [];
    this.tracked.clear();
    this.addObject();
    const length = this.clip?.length ?? 0;
    this.slider.max = Math.max(0, length - 1);
    this.slider.value = this.index;
    this.slider.disabled = this.playButton.disabled = length < 2;
    this.number();
    this.drawTimeline();
  }

  /** Masks of another model or of other marks are not kept. */
  forget() {
    this.cancel();
    this.tracked.clear();
    for (const object of this.objects ?? []) object.preview = null;
    this.draw();
    this.drawTimeline();
    this.tell();
  }

  tell() {
    const missing = this.app.models.missing("tracking", "tracks");
    if (missing) this.status.note(missing);
    else if (!this.clip) this.status.say("Choose a clip first.");
    else if (!this.running && !this.marked.length) this.status.say("Click on an object, or drag a box around it.");
    this.go.disabled = missing !== null || !this.clip || !this.marked.length || this.running !== undefined;
    return !missing && this.clip !== null;
  }

  get marked() {
    return (this.objects ?? []).filter((object) => object.points.length || object.box);
  }

  addObject() {
    const id = this.objects.reduce((most, object) => Math.max(most, object.id), 0) + 1;
    this.objects.push({ id, frame: null, points: [], labels: [], box: null, preview: null });
    this.current = this.objects.length - 1;
    this.listObjects();
    this.draw();
  }

  listObjects() {
    const name = "track-object";
    fill(this.rows, this.objects.map((object, i) => el("li", {},
      el("label", {},
        el("input", { type: "radio", name, checked: i === this.current, on: { change: () => { this.current = i; this.listObjects(); } } }),
        dot(object.id - 1), ` Object ${object.id} `,
        el("span", { class: "hint", text: object.frame === null ? "not marked yet" : `on frame ${object.frame + 1}` }),
      ),
      object.frame === null ? null : el("button", {
        type: "button", class: "quiet", text: "Remove", "aria-label": `Remove object ${object.id}`, on: { click: () => this.remove(i) },
      }),
    )));
    this.undoButton.disabled = !this.objects[this.current]?.points.length && !this.objects[this.current]?.box;
    this.tell();
  }

  remove(i) {
    this.objects.splice(i, 1);
    this.tracked.clear();
    this.current = Math.max(0, Math.min(this.current, this.objects.length - 1));
    if (this.objects.length) this.listObjects();
    else this.addObject();
    this.draw();
    this.drawTimeline();
  }

  mark({ point, label, box }) {
    if (!this.tell()) return;
    const object = this.objects[this.current];
    if (object.frame !== this.index) Object.assign(object, { frame: this.index, points: [], labels: [], box: null, preview: null });
    if (point) {
      object.points.push(point);
      object.labels.push(label);
    } else object.box = box;
    this.changed(object);
  }

  undo() {
    const object = this.objects[this.current];
    if (object.points.length) {
      object.points.pop();
      object.labels.pop();
    } else object.box = null;
    if (!object.points.length && !object.box) Object.assign(object, { frame: null, preview: null });
    this.changed(object);
  }

  clearObject() {
    const object = this.objects[this.current];
    Object.assign(object, { frame: null, points: [], labels: [], box: null, preview: null });
    this.changed(object);
  }

  changed(object) {
    this.cancel();
    this.tracked.clear();
    this.listObjects();
    this.draw();
    this.drawTimeline();
    if (object.frame !== null) this.preview(object);
  }

  /** The tracker's own mask on the marked frame, asked for with that frame alone. */
  async preview(object) {
    this.previewing?.abort();
    const mine = (this.previewing = new AbortController());
    const { clip } = this;
    this.status.busy("Asking…");
    const started = performance.now();
    try {
      const body = { model: this.model.value, video: [await clip.uri(object.frame)], propagate: false, ...prompts([object], object.frame) };
      const answer = await call("POST", "v1/inference/tracking", body, { signal: mine.signal });
      if (mine.signal.aborted) return;
      const found = answer.data.frames[0].objects[0];
      object.preview = new Mask(found.mask);
      const text = `Object ${object.id}: ${object.preview.area.toLocaleString("en")} pixels on frame ${object.frame + 1}, ${seconds((performance.now() - started) / 1000)}.`;
      this.status.say(`${text} Mark more, or press Track.`);
      announce(text);
      this.draw();
    } catch (error) {
      this.status.show(error);
    }
  }

  async run() {
    if (!this.tell() || this.running || !this.marked.length) return;
    const { clip, marked } = this;
    this.previewing?.abort();
    const mine = (this.running = new AbortController());
    mine.started = performance.now();
    this.tracked.clear();
    this.follow = true;
    this.play(false);
    this.go.disabled = true;
    this.stop.disabled = false;
    this.progress.hidden = false;
    this.progress.removeAttribute("value");
    this.status.busy("Sending the frames…");
    try {
      const video = await Promise.all(clip.files.map((_, i) => clip.uri(i)));
      const body = { model: this.model.value, video, propagate: true, ...prompts(marked, 0) };
      const requests = this.intervals(marked);
      const all = requests.reduce((sum, request) => sum + request.frames, 0);
      let done = 0;
      for (const { interval } of requests) {
        for await (const frame of this.frames({ ...body, ...(interval ? { interval } : {}) }, mine)) {
          if (mine.signal.aborted) return;
          done += 1;
          this.arrived(frame, done, all, mine);
        }
      }
      const time = (performance.now() - mine.started) / 1000;
      const text = `${done} frames in ${seconds(time)}, ${(done / time).toFixed(1)} per second. Scrub or play them.`;
      this.status.say(text);
      announce(text);
    } catch (error) {
      this.status.show(error);
    } finally {
      if (this.running === mine) this.ended();
    }
  }

  /** What to ask for: {interval, frames that will come}. The server goes forward to the end by itself. */
  intervals(marked) {
    const first = Math.min(...marked.map((object) => object.frame));
    const last = Math.max(...marked.map((object) => object.frame));
    const forward = { interval: null, frames: this.clip.length - first };
    const backward = { interval: { startFrame: last, endFrame: 0, direction: "backward" }, frames: last + 1 };
    return { forward: [forward], backward: [backward], both: last > 0 ? [forward, backward] : [forward] }[this.way.value];
  }

  /** Frames as they come, from a stream that ends with this page, or from a job that does not. */
  async *frames(body, run) {
    const { signal } = run;
    let path = "v1/inference/tracking/stream";
    if (this.asJob.checked) {
      const job = await call("POST", "v1/inference/tracking/jobs", body, { signal });
      run.job = job.jobId;
      rememberJob(job.jobId);
      path = `v1/jobs/${encodeURIComponent(job.jobId)}/frames?from=0`;
    }
    const response = run.job ? await send("GET", path, undefined, { signal }) : await send("POST", path, body, { signal });
    for await (const line of lines(response)) yield orThrow(line);
    run.job = undefined;
  }

  arrived({ frameIndex, objects }, done, all, run) {
    const found = this.tracked.get(frameIndex) ?? new Map();
    for (const { trackId, mask, score } of objects) if (mask) found.set(trackId, { mask: new Mask(mask), score: score ?? 1 });
    this.tracked.set(frameIndex, found);
    this.progress.value = done / all;
    const rate = done / ((performance.now() - run.started) / 1000);
    this.status.busy(`Frame ${done} of ${all}, ${rate.toFixed(1)} per second`);
    if (this.follow) this.show(frameIndex);
    else if (frameIndex === this.index) this.draw();
    this.drawTimeline();
  }

  /** Ends what runs: a stream by hanging up, a job by its own request. */
  cancel() {
    const run = this.running;
    if (!run) return;
    run.abort();
    if (run.job) call("DELETE", `v1/jobs/${encodeURIComponent(run.job)}`).catch((error) => this.status.show(error));
    this.ended();
    this.status.say(`Cancelled. ${this.tracked.size} frames are here.`);
    announce("Cancelled.");
  }

  ended() {
    this.running = undefined;
    this.stop.disabled = true;
    this.progress.hidden = true;
    this.go.disabled = !this.marked.length;
  }

  async show(index) {
    this.index = index;
    this.slider.value = index;
    this.number();
    const { clip } = this;
    try {
      const picture = await clip.frame(index);
      if (this.clip !== clip || this.index !== index) return;
      this.app.clipStage.set(picture, { same: true });
      this.draw();
      this.drawTimeline();
    } catch (error) {
      this.play(false);
      this.status.show(error);
    }
  }

  number() {
    const length = this.clip?.length ?? 0;
    byId("frame-number").textContent = `${length ? this.index + 1 : 0} / ${length}`;
    this.slider.setAttribute("aria-valuetext", `Frame ${this.index + 1} of ${length}`);
  }

  play(on) {
    clearInterval(this.playing);
    this.playing = undefined;
    if (on && this.clip) {
      this.follow = false;
      this.playing = setInterval(() => this.show((this.index + 1) % this.clip.length), 1000 / this.clip.fps);
    }
    if (this.playButton) this.playButton.textContent = on ? "Pause" : "Play";
  }

  draw() {
    if (this.app.active !== this) return;
    const here = this.tracked.get(this.index);
    const objects = this.objects.filter((object) => object.frame === this.index);
    const layers = here
      ? [...here].map(([id, { mask }]) => ({ mask, colour: colourOf(id - 1) }))
      : objects.filter((object) => object.preview).map((object) => ({ mask: object.preview, colour: colourOf(object.id - 1) }));
    this.app.clipStage.show({
      layers,
      boxes: objects.filter((object) => object.box).map((object) => ({ box: object.box, colour: colourOf(object.id - 1) })),
      points: objects.flatMap((object) => object.points.map(([x, y], i) => (
        { x, y, label: object.labels[i], faint: object !== this.objects[this.current] }))),
    });
  }

  /** A row per object: where it was followed, and where it is to be seen. */
  drawTimeline() {
    const canvas = byId("timeline");
    const rows = this.tracked.size ? this.marked : [];
    canvas.hidden = !rows.length;
    if (!rows.length) return;
    canvas.style.height = `${rows.length * ROW}px`;
    const dense = Math.min(window.devicePixelRatio || 1, 2);
    const width = Math.max(1, Math.round(canvas.clientWidth * dense));
    const height = Math.round(rows.length * ROW * dense);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    const cell = width / this.clip.length;
    rows.forEach((object, row) => {
      for (const [index, found] of this.tracked) {
        const there = found.get(object.id);
        const seen = there && there.mask.area > 0;
        context.fillStyle = css(colourOf(object.id - 1), seen ? 0.35 + 0.65 * there.score : 0.12);
        context.fillRect(index * cell, row * ROW * dense, Math.ceil(cell), (ROW - 2) * dense);
      }
    });
    context.fillStyle = getComputedStyle(canvas).color;
    context.fillRect((this.index + 0.5) * cell - dense, 0, 2 * dense, height);
  }
}

/** Objects as the wire has them, on frames counted from `first`. */
function prompts(objects, first) {
  return {
    objectsIds: objects.map((object) => object.id),
    frameIndexes: objects.map((object) => object.frame - first),
    keyframes: objects.map(({ frame, points, labels, box }) => ({
      frameIndex: frame - first,
      prompts: {
        points: points.length ? points.map(([x, y], i) => ({ x, y, label: labels[i] })) : null,
        box: box && { x: box[0], y: box[1], width: box[2] - box[0], height: box[3] - box[1] },
      },
    })),
  };
}
