// A device of a pocketfed fleet in Node.js.
//
//   node client.js --coordinator HOST:PORT --examples FILE.jsonl|FILE.csv --home FOLDER [--name NAME] [--channel stable]
//                  [--ca ca.pem] [--enrolment-key KEY] [--publisher ROOT] [--predict TEXT]
//
// Takes part in rounds until SIGTERM or SIGINT; with --predict it prints the label of a text by the release it holds.

import { parseArgs } from 'node:util';

import { Device } from './device.js';
import { readExamples } from './examples.js';

const text = (standard) => ({ type: 'string', default: standard });

async function main() {
  const { values } = parseArgs({
    options: {
      coordinator: text(),
      examples: text(),
      home: text(),
      name: text(''),
      channel: text('stable'),
      ca: text(''),
      'enrolment-key': text(''),
      publisher: text(''),
      predict: text(),
    },
  });
  for (const needed of ['coordinator', 'home', ...(values.predict === undefined ? ['examples'] : [])])
    if (!values[needed]) throw new Error(`--${needed} is missing; see the top of client.js`);
  const examples = values.examples ? readExamples(values.examples) : [];
  const say = (line) => console.log(Array.from(String(line), (c) => (c < ' ' ? ' ' : c)).join('')); // some a peer wrote
  const device = new Device({ ...values, key: values['enrolment-key'], examples, say });
  if (values.predict !== undefined) return console.log(await device.predict(values.predict));
  const stop = new AbortController();
  for (const name of ['SIGTERM', 'SIGINT'])
    process.once(name, () => stop.abort(new Error('the app stopped the device')));
  await device.live(stop.signal);
}

try {
  await main();
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
}
