// Pictures as the server sees them: the stored pixels, whatever their EXIF orientation says.

import { ApiError } from "./api.js";

/** Longest side that is kept for drawing; a larger picture is drawn from a smaller copy. */
const DRAWN = 4096;

/**
 * Opens a picture file. Returns {file, name, width, height, bitmap}: the size is that of the stored pixels, to which
 * all coordinates refer; `bitmap` may be smaller. The caller closes it.
 */
export async function openImage(file) {
  const name = file.name || "the picture";
  let bitmap;
  try {
    bitmap = await decode(file);
  } catch {
    throw new ApiError(
      0,
      `This browser cannot show ${name}.`,
      "Convert it to PNG, JPEG or WebP. (The server reads TIFF and JPEG 2000 as well, but they cannot be drawn here.)",
    );
  }
  const { width, height } = bitmap;
  const scale = DRAWN / Math.max(width, height);
  if (scale < 1) {
    const small = await createImageBitmap(bitmap, {
      resizeWidth: Math.max(1, Math.round(width * scale)),
      resizeHeight: Math.max(1, Math.round(height * scale)),
      resizeQuality: "medium",
    });
    bitmap.close();
    bitmap = small;
  }
  return { file, name, width, height, bitmap };
}

/** A bitmap of the stored pixels. JPEG files are decoded without their orientation, since browsers differ in "none". */
export async function decode(file) {
  return createImageBitmap(await unrotated(file), { imageOrientation: "none", colorSpaceConversion: "default" });
}

/** The same JPEG with the EXIF orientation set to 1; any other file as it is. */
async function unrotated(file) {
  const head = new DataView(await file.slice(0, 65536 * 2).arrayBuffer());
  const at = orientationAt(head);
  if (at === null) return file;
  const value = new Uint8Array(2);
  new DataView(value.buffer).setUint16(0, 1, at.little);
  return new Blob([file.slice(0, at.offset), value, file.slice(at.offset + 2)], { type: file.type });
}

/** Where the value of the orientation tag lies in a JPEG file; null where there is none. */
function orientationAt(view) {
  try {
    if (view.getUint16(0) !== 0xffd8) return null;
    let at = 2;
    while (view.getUint8(at) === 0xff) {
      const marker = view.getUint8(at + 1);
      if (marker === 0xda) return null; // the pixels begin
      if (marker === 0xe1 && view.getUint32(at + 4) === 0x45786966) return inTiff(view, at + 10);
      at += 2 + view.getUint16(at + 2);
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // the file ends early
  }
  return null;
}

function inTiff(view, tiff) {
  const little = view.getUint16(tiff) === 0x4949;
  const directory = tiff + view.getUint32(tiff + 4, little);
  for (let i = 0, at = directory + 2; i < view.getUint16(directory, little); i += 1, at += 12) {
    if (view.getUint16(at, little) === 0x0112) return { offset: at + 8, little };
  }
  return null;
}

/** The picture files of a drop or a paste. */
export function pictures(transfer) {
  return [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
}
