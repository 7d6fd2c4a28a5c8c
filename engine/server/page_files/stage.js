// The picture with masks, boxes and points over it, and the ways to point at it: mouse, finger, pen and keys.

import { announce, css, el } from "./dom.js";
import { paint } from "./rle.js";

const DRAG = 4; // CSS pixels that a pointer moves before it draws a box
const OVERLAY = 1400; // longest side of the masks' own canvas
const LOWEST = 24; // CSS pixels that the shorter side of the picture has at least

/** Keys of a stage, for its help text. */
export const KEYS = [
  ["Arrows", "move the crosshair (Shift: ten times as far, Alt: one pixel)"],
  ["Enter or Space", "point that belongs to the object"],
  ["Shift + Enter", "point that does not"],
  ["B", "first corner of a box, then the second"],
  ["Escape", "leave the box"],
  ["Backspace", "undo"],
  ["Delete", "clear"],
];

/**
 * One picture. `use` says who listens: `point(x, y, label)`, `box([x1, y1, x2, y2])`, `undo()`, `clear()`, all in
 * pixels of the picture. `show` says what lies over it.
 */
export class Stage {
  constructor(host, label, empty) {
    this.host = host;
    host.classList.add("stage");
    this.empty = el("p", { class: "empty", text: empty });
    this.canvas = el("canvas", {
      tabIndex: 0, role: "application", hidden: true, "aria-label": `${label}. Arrow keys move a crosshair, Enter marks a point, B begins a box.`,
    });
    host.append(this.empty, this.canvas);
    this.overlay = document.createElement("canvas");
    this.scene = { layers: [], boxes: [], points: [] };
    this.handlers = {};
    this.tool = "add";
    this.picture = null;
    this.cross = null; // crosshair {x, y}, once a key moved it
    this.corner = null; // first corner of a box made by keys
    this.drag = null; // {x, y: where it began, at: where it is, moved}
    this.listen();
    new ResizeObserver(() => this.fit()).observe(host);
  }

  /** Another picture: {bitmap, width, height}, or null for none. With `same`, it is a frame of the same clip. */
  set(picture, { same = false } = {}) {
    this.picture = picture;
    this.empty.hidden = picture !== null;
    this.canvas.hidden = picture === null;
    if (!same || (this.cross && picture && (this.cross.x >= picture.width || this.cross.y >= picture.height))) {
      this.cross = this.corner = null;
    }
    this.drag = null;
    this.fit();
  }

  use(handlers) {
    this.handlers = handlers;
    this.corner = this.drag = null;
    this.draw();
  }

  setTool(tool) {
    this.tool = tool;
    this.canvas.classList.toggle("drawing", tool === "box");
  }

  /** `layers`: {mask, colour}; `boxes`: {box, colour, text, faint}; `points`: {x, y, label}. */
  show({ layers = [], boxes = [], points = [] }) {
    const same = layers.length === this.scene.layers.length &&
      layers.every((layer, i) => layer.mask === this.scene.layers[i].mask && layer.colour === this.scene.layers[i].colour);
    this.scene = { layers, boxes, points };
    if (!same) this.painted = null;
    this.draw();
  }

  fit() {
    if (!this.picture) return;
    const { width, height } = this.picture;
    const wide = this.host.clientWidth;
    if (!wide) return; // hidden
    const high = Math.max(220, Math.round(window.innerHeight * 0.7));
    const scale = Math.min(wide / width, high / height);
    this.width = Math.min(wide, Math.max(LOWEST, Math.round(width * scale)));
    this.height = Math.max(LOWEST, Math.round(height * scale));
    const dense = Math.min(window.devicePixelRatio || 1, 2);
    this.canvas.style.width = `${this.width}px`;
    this.canvas.style.height = `${this.height}px`;
    const [w, h] = [Math.round(this.width * dense), Math.round(this.height * dense)];
    if (this.canvas.width !== w || this.canvas.height !== h) {
      this.canvas.width = w;
      this.canvas.height = h;
      this.painted = null;
    }
    this.draw();
  }

  draw() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      if (this.picture && this.width) this.render();
    });
  }

  render() {
    const context = this.canvas.getContext("2d");
    const { width: w, height: h } = this.canvas;
    this.unit = w / this.width; // device pixels of a CSS pixel
    context.imageSmoothingEnabled = w < this.picture.width * 3; // far enlarged, the pixels themselves are shown
    context.imageSmoothingQuality = "high";
    context.clearRect(0, 0, w, h);
    context.drawImage(this.picture.bitmap, 0, 0, w, h);
    if (this.scene.layers.length) {
      if (!this.painted) this.paintMasks(w, h);
      context.imageSmoothingEnabled = true;
      context.drawImage(this.overlay, 0, 0, w, h);
    }
    for (const box of this.scene.boxes) this.drawBox(context, box);
    for (const box of this.scene.boxes) if (box.text) this.drawText(context, box);
    for (const point of this.scene.points) this.drawPoint(context, point);
    const open = this.openBox();
    if (open) this.drawBox(context, { box: open, colour: [255, 255, 255], dashed: true });
    if (this.cross && document.activeElement === this.canvas) this.drawCross(context, this.cross);
  }

  paintMasks(w, h) {
    const scale = Math.min(1, OVERLAY / Math.max(w, h));
    const [ow, oh] = [Math.max(1, Math.round(w * scale)), Math.max(1, Math.round(h * scale))];
    if (this.overlay.width !== ow || this.overlay.height !== oh) {
      this.overlay.width = ow;
      this.overlay.height = oh;
    }
    const context = this.overlay.getContext("2d");
    const rim = Math.max(1, Math.round(1.6 * this.unit * scale));
    context.putImageData(paint(new ImageData(ow, oh), this.scene.layers, rim), 0, 0);
    this.painted = true;
  }

  /** Corners of the box that is being drawn, by pointer or by keys. */
  openBox() {
    if (this.drag?.moved) return ordered(this.drag, this.drag.at);
    if (this.corner && this.cross) return ordered(this.corner, this.cross);
    return null;
  }

  // Edges of pixels, and their centres, on the canvas.
  edge(x, y) {
    return [(x * this.canvas.width) / this.picture.width, (y * this.canvas.height) / this.picture.height];
  }

  drawBox(context, { box, colour, faint, dashed, strong }) {
    const [x1, y1] = this.edge(box[0], box[1]);
    const [x2, y2] = this.edge(Math.max(box[2], box[0] + 1), Math.max(box[3], box[1] + 1));
    const line = (strong ? 3.5 : 2) * this.unit;
    context.save();
    context.globalAlpha = faint ? 0.55 : 1;
    context.lineJoin = "round";
    context.strokeStyle = "rgb(0 0 0 / .6)";
    context.lineWidth = line + 2 * this.unit;
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    if (dashed) context.setLineDash([5 * this.unit, 4 * this.unit]);
    context.strokeStyle = css(colour);
    context.lineWidth = line;
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    context.restore();
  }

  /** The name of a box, above all boxes. */
  drawText(context, { box, colour, text, faint }) {
    const [x, y] = this.edge(box[0], box[1]);
    const size = 12.5 * this.unit;
    context.font = `600 ${size}px system-ui, sans-serif`;
    context.textBaseline = "middle";
    const width = context.measureText(text).width + size * 0.8;
    const height = size * 1.5;
    const left = Math.max(0, Math.min(x - this.unit, this.canvas.width - width));
    const top = y - height >= 0 ? y - height : y; // inside the box where there is no room above it
    context.globalAlpha = faint ? 0.55 : 1;
    context.fillStyle = css(colour);
    context.fillRect(left, top, width, height);
    context.fillStyle = bright(colour) ? "#000" : "#fff";
    context.fillText(text, left + size * 0.4, top + height / 2);
    context.globalAlpha = 1;
  }

  drawPoint(context, { x, y, label, faint }) {
    const [cx, cy] = this.edge(x + 0.5, y + 0.5);
    const r = 7 * this.unit;
    context.save();
    context.globalAlpha = faint ? 0.6 : 1;
    for (const [radius, fill] of [[r + 3 * this.unit, "rgb(0 0 0 / .6)"], [r + 1.6 * this.unit, "#fff"], [r, label ? "#0a7d33" : "#c62828"]]) {
      context.beginPath();
      context.arc(cx, cy, radius, 0, 2 * Math.PI);
      context.fillStyle = fill;
      context.fill();
    }
    context.strokeStyle = "#fff";
    context.lineWidth = 2 * this.unit;
    context.beginPath();
    context.moveTo(cx - r * 0.55, cy);
    context.lineTo(cx + r * 0.55, cy);
    if (label) {
      context.moveTo(cx, cy - r * 0.55);
      context.lineTo(cx, cy + r * 0.55);
    }
    context.stroke();
    context.restore();
  }

  drawCross(context, { x, y }) {
    const [cx, cy] = this.edge(x + 0.5, y + 0.5);
    const gap = 6 * this.unit;
    for (const [line, style] of [[3.5, "rgb(0 0 0 / .7)"], [1.5, "#fff"]]) {
      context.lineWidth = line * this.unit;
      context.strokeStyle = style;
      context.beginPath();
      for (const [ax, ay, bx, by] of [
        [0, cy, cx - gap, cy], [cx + gap, cy, this.canvas.width, cy], [cx, 0, cx, cy - gap], [cx, cy + gap, cx, this.canvas.height],
      ]) {
        context.moveTo(ax, ay);
        context.lineTo(bx, by);
      }
      context.stroke();
    }
  }

  /** The pixel of the picture under a pointer. */
  pixel(event) {
    const place = this.canvas.getBoundingClientRect();
    const limit = (value, size) => Math.max(0, Math.min(size - 1, Math.floor(value)));
    return {
      x: limit(((event.clientX - place.left) / place.width) * this.picture.width, this.picture.width),
      y: limit(((event.clientY - place.top) / place.height) * this.picture.height, this.picture.height),
    };
  }

  listen() {
    const on = (type, run) => this.canvas.addEventListener(type, run);
    on("contextmenu", (event) => event.preventDefault());
    on("pointerdown", (event) => {
      if (!this.picture || !event.isPrimary || (event.button !== 0 && event.button !== 2)) return;
      this.canvas.setPointerCapture(event.pointerId);
      const at = this.pixel(event);
      this.drag = { ...at, at, moved: false, left: event.clientX, top: event.clientY, negative: event.button === 2 || event.shiftKey };
    });
    on("pointermove", (event) => {
      if (!this.drag || !event.isPrimary) return;
      this.drag.at = this.pixel(event);
      // A finger scrolls the page unless the box tool is chosen.
      const draws = event.pointerType !== "touch" || this.tool === "box";
      const far = Math.hypot(event.clientX - this.drag.left, event.clientY - this.drag.top) >= DRAG;
      if (draws && far && this.handlers.box) this.drag.moved = true;
      this.draw();
    });
    on("pointercancel", () => this.end());
    on("pointerup", (event) => {
      if (!this.drag || !event.isPrimary) return;
      const { x, y, at, moved, negative } = this.end();
      if (moved) this.handlers.box?.(ordered({ x, y }, at));
      else if (this.tool === "box") announce("Drag from one corner of the box to the other.");
      else this.handlers.point?.(x, y, negative || this.tool === "remove" ? 0 : 1);
    });
    on("keydown", (event) => this.onKey(event));
    on("focus", () => this.draw());
    on("blur", () => this.draw());
  }

  end() {
    const drag = this.drag;
    this.drag = null;
    this.draw();
    return drag;
  }

  onKey(event) {
    if (!this.picture) return;
    const { width, height } = this.picture;
    const step = event.altKey ? 1 : Math.max(1, Math.round(Math.max(width, height) / 100)) * (event.shiftKey ? 10 : 1);
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const letter = event.ctrlKey || event.metaKey ? `Ctrl+${event.key.toLowerCase()}` : event.key;
    if (letter in moves || ["Enter", " ", "b", "B"].includes(letter)) {
      this.cross ??= { x: width >> 1, y: height >> 1 };
    }
    if (letter in moves) {
      const [dx, dy] = moves[letter];
      this.cross = {
        x: Math.max(0, Math.min(width - 1, this.cross.x + dx * step)),
        y: Math.max(0, Math.min(height - 1, this.cross.y + dy * step)),
      };
      announce(`${this.cross.x}, ${this.cross.y}`);
    } else if (letter === "Enter" || letter === " ") {
      if (this.corner || (this.tool === "box" && this.handlers.box)) this.markCorner();
      else this.handlers.point?.(this.cross.x, this.cross.y, event.shiftKey || this.tool === "remove" ? 0 : 1);
    } else if ((letter === "b" || letter === "B") && this.handlers.box) this.markCorner();
    else if (letter === "Escape" && (this.corner || this.drag)) {
      this.corner = this.drag = null;
      announce("Box left.");
    } else if (letter === "Backspace" || letter === "Ctrl+z") this.handlers.undo?.();
    else if (letter === "Delete") this.handlers.clear?.();
    else if (!this.handlers.key?.(letter)) return;
    event.preventDefault();
    this.draw();
  }

  markCorner() {
    if (!this.corner) {
      this.corner = { ...this.cross };
      announce("First corner set. Move to the second one and press Enter.");
      return;
    }
    const box = ordered(this.corner, this.cross);
    this.corner = null;
    this.handlers.box(box);
  }
}

function ordered(a, b) {
  return [Math.min(a.x, b.x), Math.min(a.y, b.y), Math.max(a.x, b.x), Math.max(a.y, b.y)];
}

function bright([r, g, b]) {
  return 0.299 * r + 0.587 * g + 0.114 * b > 140;
}
