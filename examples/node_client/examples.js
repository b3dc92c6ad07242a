// The device's labelled examples, from a file with one { text, label, pair } a line (JSONL) or a row (CSV with a header).

import { readFileSync } from 'node:fs';

export function readExamples(path) {
  const content = readFileSync(path, 'utf8');
  const rows = path.endsWith('.csv') ? readCsv(content) : readLines(content, path);
  const usable = rows.filter(({ text, label }) => typeof text === 'string' && text.trim() && label);
  return usable.map(({ text, label, pair }) => ({ text, label: String(label), pair: pair || null }));
}

function readLines(content, path) {
  return content.split('\n').flatMap((line, i) => {
    try {
      return line.trim() ? [JSON.parse(line)] : [];
    } catch {
      throw new Error(`line ${i + 1} of ${path} is not JSON; give one {"text": ..., "label": ...} a line`);
    }
  });
}

// RFC 4180: fields in quotes may hold commas, line ends and, doubled, quotes.
function readCsv(content) {
  const rows = [[]];
  for (const [, quoted, plain, end] of content.matchAll(/(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r?\n|$)/g)) {
    rows.at(-1).push(quoted === undefined ? plain : quoted.replaceAll('""', '"'));
    if (end !== ',') rows.push([]);
  }
  const [names, ...values] = rows.filter((row) => row.join(''));
  return values.map((row) => Object.fromEntries(names.map((name, i) => [name, row[i]])));
}
