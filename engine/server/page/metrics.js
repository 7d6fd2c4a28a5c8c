// Prometheus' text format, as far as latencies need it.

/** Samples of the text: {name, labels, value}. */
export function samples(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const parts = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/.exec(line);
    if (!parts) continue;
    const labels = {};
    for (const [, name, value] of (parts[2] ?? "").matchAll(/([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    }
    found.push({ name: parts[1], labels, value: parts[3] === "+Inf" ? Infinity : Number(parts[3]) });
  }
  return found;
}

/**
 * Histograms of one name: key (the values of `labels`, joined by a tab) -> {count, sum, buckets: [[bound, count up to
 * it], ...]}, ordered by bound.
 */
export function histograms(all, name, labels) {
  const found = new Map();
  for (const sample of all) {
    const kind = sample.name.startsWith(`${name}_`) ? sample.name.slice(name.length + 1) : "";
    if (!["bucket", "count", "sum"].includes(kind)) continue;
    const key = labels.map((label) => sample.labels[label] ?? "").join("\t");
    if (!found.has(key)) found.set(key, { count: 0, sum: 0, buckets: new Map() });
    const histogram = found.get(key);
    if (kind === "bucket") {
      const bound = sample.labels.le === "+Inf" ? Infinity : Number(sample.labels.le);
      histogram.buckets.set(bound, (histogram.buckets.get(bound) ?? 0) + sample.value);
    } else histogram[kind] += sample.value;
  }
  for (const histogram of found.values()) histogram.buckets = [...histogram.buckets].sort((a, b) => a[0] - b[0]);
  return found;
}

/** The value below which the share `q` lies, straight between the bounds of its bucket; null where there is none. */
export function quantile({ count, buckets }, q) {
  if (!count) return null;
  let [low, before] = [0, 0];
  for (const [bound, upTo] of buckets) {
    if (upTo >= q * count) {
      if (bound === Infinity) return low;
      return upTo === before ? bound : low + ((bound - low) * (q * count - before)) / (upTo - before);
    }
    [low, before] = [bound, upTo];
  }
  return low;
}
