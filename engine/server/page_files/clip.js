// Clips: the frames that are shown are the files that are sent, so their numbers cannot differ.

import { ApiError, dataUri } from "./api.js";
import { openImage } from "./image.js";

const MOST_FRAMES = 300;
const MOST_BYTES = 70 * 2 ** 20; // base64 makes it a third more; the server's own limit is 100 MiB
const KEPT_PIXELS = 120e6; // decoded frames in memory

/** Frames in order, each a picture file. Bitmaps are decoded when shown, and the oldest ones closed. */
export class Clip {
  constructor(name, files, fps) {
    if (!files.length) throw new ApiError(0, "There is no frame.", "Choose picture files, or a video.");
    if (files.length > MOST_FRAMES) {
      throw new ApiError(0, `${files.length} frames are more than the ${MOST_FRAMES} of this page.`, "Choose fewer; the API takes longer clips.");
    }
    this.bytes = files.reduce((sum, file) => sum + file.size, 0);
    if (this.bytes > MOST_BYTES) {
      throw new ApiError(0, "These frames are too large to be sent at once.", "Choose fewer, or take fewer frames per second.");
    }
    this.name = name;
    this.files = files;
    this.fps = fps;
    this.kept = new Map();
    this.uris = [];
  }

  get length() {
    return this.files.length;
  }

  /** Frame `index`: {bitmap, width, height}. The bitmap is the clip's own. */
  async frame(index) {
    let found = this.kept.get(index);
    this.kept.delete(index);
    found ??= openImage(this.files[index]);
    this.kept.set(index, found); // the last one used is the last one closed
    let picture;
    try {
      picture = await found;
    } catch (error) {
      this.kept.delete(index);
      throw error;
    }
    const most = Math.max(8, Math.floor(KEPT_PIXELS / (picture.width * picture.height)));
    for (const old of [...this.kept.keys()].slice(0, Math.max(0, this.kept.size - most))) {
      this.kept.get(old).then(({ bitmap }) => setTimeout(() => bitmap.close(), 1000));
      this.kept.delete(old);
    }
    return picture;
  }

  /** Frame `index` as a ``data:`` URI, made once. */
  uri(index) {
    return (this.uris[index] ??= dataUri(this.files[index]));
  }

  close() {
    for (const frame of this.kept.values()) frame.then(({ bitmap }) => bitmap.close(), () => {});
    this.kept.clear();
    this.uris = [];
  }
}

/** A clip of picture files, ordered by name with numbers as numbers. */
export function ofFiles(files) {
  const order = new Intl.Collator("en", { numeric: true });
  const sorted = [...files].sort((a, b) => order.compare(a.name, b.name));
  return new Clip(sorted.length ? `${sorted[0].name} and on` : "", sorted, 10);
}

/** The clip that comes with the server. */
export async function demoClip(base) {
  const listing = await fetch(new URL(`${base}/demo/clip.json`, document.baseURI));
  const count = listing.ok ? (await listing.json()).frames : 0;
  if (!count) throw new ApiError(0, "The demo clip is not in this installation.", "Choose frames or a video of your own.");
  const files = await Promise.all(Array.from({ length: count }, async (_, i) => {
    const response = await fetch(new URL(`${base}/demo/clip/${i}.jpg`, document.baseURI));
    if (!response.ok) throw new ApiError(response.status, "The demo clip did not load.", "Reload the page.");
    return new File([await response.blob()], `demo-${i}.jpg`, { type: "image/jpeg" });
  }));
  return new Clip("Demo clip", files, 12);
}

/**
 * A clip of the frames of a video at `fps`, taken by this browser as JPEG pictures. `progress(done, all)` is told;
 * `signal` stops it.
 */
export async function ofVideo(file, fps, progress, signal) {
  const video = document.createElement("video");
  video.muted = true;
  video.preload = "auto";
  const address = URL.createObjectURL(file);
  try {
    video.src = address;
    await event(video, "loadeddata", file, signal);
    if (video.duration === Infinity) {
      // Recordings of browsers do not tell their length before their end was seen.
      video.currentTime = 1e7;
      await event(video, "seeked", file, signal);
    }
    const count = Math.max(1, Math.floor(video.duration * fps + 1e-6));
    if (count > MOST_FRAMES) {
      throw new ApiError(0, `${count} frames are more than the ${MOST_FRAMES} of this page.`, "Take fewer frames per second, or cut the video.");
    }
    const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
    const context = canvas.getContext("2d");
    const files = [];
    for (let i = 0; i < count; i += 1) {
      video.currentTime = Math.min((i + 0.5) / fps, video.duration);
      await event(video, "seeked", file, signal);
      context.drawImage(video, 0, 0);
      const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.93 });
      files.push(new File([blob], `${file.name}-${i}.jpg`, { type: "image/jpeg" }));
      progress(i + 1, count);
    }
    return new Clip(file.name, files, fps);
  } finally {
    video.removeAttribute("src");
    video.load();
    URL.revokeObjectURL(address);
  }
}

function event(video, name, file, signal) {
  return new Promise((resolve, reject) => {
    const fail = () => reject(new ApiError(
      0, `This browser cannot play ${file.name}.`,
      "Convert it: ffmpeg -i input -c:v libx264 -pix_fmt yuv420p output.mp4; or choose its frames as pictures.",
    ));
    const stop = () => reject(new DOMException("Stopped.", "AbortError"));
    const once = { once: true, signal };
    if (signal?.aborted) stop();
    signal?.addEventListener("abort", stop, { once: true });
    video.addEventListener(name, resolve, once);
    video.addEventListener("error", fail, once);
  });
}
