// WordPiece from the data inside an artifact's tokenize plan, for runtimes without onnxruntime-extensions.
// The plan's table from code point to text and its vocabulary are read out of the ONNX file; no rule or Unicode table is here.

const END_OF_TEXT = 0x110000; // what closes a text in the plan's input

const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });
export const text = (bytes) => decoder.decode(bytes);

// The same ids as client_sdk/tokenizer.py, which runs the plan.
export class Tokenizer {
  constructor(plan, maxLength) {
    const model = fields(plan);
    const graph = fields(model.get(7)[0]);
    const tensors = named(graph.get(5), 8); // TensorProto by name
    const wordpiece = graph
      .get(1)
      .map(fields)
      .find((node) => text(node.get(4)[0]) === 'WordpieceTokenizer');
    const attributes = named(wordpiece?.get(5) ?? [], 1);
    const integers = (name) => new Int32Array(need(tensors, name).get(9)[0].slice().buffer);
    const string = (name) => text(need(attributes, name).get(4)[0]);
    const metadata = new Map(
      model
        .get(14)
        .map(fields)
        .map((entry) => [text(entry.get(1)[0]), text(entry.get(2)[0])]),
    );
    const id = (name) => Number(need(metadata, name));

    this.block = integers('block')[0];
    this.blockOf = integers('block_of');
    this.blocks = integers('blocks');
    this.spellings = need(tensors, 'spellings').get(6).map(text);
    this.vocabulary = new Map(Object.entries(JSON.parse(string('vocab'))));
    this.prefix = string('suffix_indicator'); // marks a piece that continues a word
    this.unknown = this.vocabulary.get(string('unknown_token'));
    this.longest = Number(need(attributes, 'max_input_chars_per_word').get(3)[0]); // with the mark that ends a word
    Object.assign(this, { padId: id('pad_id'), clsId: id('cls_id'), sepId: id('sep_id'), maxLength });
  }

  // `[CLS] a [SEP]` or, where `pairs` has a text and not null, `[CLS] a [SEP] b [SEP]`, as int64 rows of one length.
  encode(texts, pairs = null, maxLength = this.maxLength) {
    if (maxLength < 3) throw new Error(`maxLength is ${maxLength}; [CLS] and two [SEP] need at least 3`);
    if (pairs !== null && pairs.length !== texts.length)
      throw new Error(`there are ${texts.length} texts and ${pairs.length} pairs; give one, or null, for each text`);
    const rows = texts.map((first, i) => this.#row(first, pairs?.[i] ?? null, Math.min(maxLength, this.maxLength)));
    const width = rows.reduce((most, row) => Math.max(most, row.length), 0);
    const shape = [rows.length, width];
    const ids = new BigInt64Array(rows.length * width).fill(BigInt(this.padId));
    const mask = new BigInt64Array(rows.length * width);
    rows.forEach((row, r) => {
      ids.set(row.map(BigInt), r * width);
      mask.fill(1n, r * width, r * width + row.length);
    });
    return { ids, mask, shape };
  }

  #row(first, second, maxLength) {
    let a = this.pieces(first);
    if (second === null) return [this.clsId, ...a.slice(0, maxLength - 2), this.sepId];
    let b = this.pieces(second);
    const room = maxLength - 3;
    if (a.length + b.length > room) {
      // the longer gives way, at last both get half
      const short = Math.min(a.length, b.length, Math.floor(room / 2));
      [a, b] =
        a.length > b.length
          ? [a.slice(0, room - short), b.slice(0, short)]
          : [a.slice(0, short), b.slice(0, room - short)];
    }
    return [this.clsId, ...a, this.sepId, ...b, this.sepId];
  }

  // Ids of one text's pieces, longest known piece first; [UNK] for a word that is not made of known pieces.
  pieces(string) {
    let spelled = '';
    for (const char of string) spelled += this.#spell(char.codePointAt(0));
    spelled += this.#spell(END_OF_TEXT); // closes the last word, and adds a word of its own: [SEP]
    const ids = [];
    for (const word of spelled.split(' ')) if (word) ids.push(...this.#word(word));
    return ids.slice(0, -1);
  }

  #spell(codePoint) {
    const row = this.blockOf[Math.floor(codePoint / this.block)];
    return this.spellings[this.blocks[row * this.block + (codePoint % this.block)]];
  }

  // A word ends in a mark that is a piece of its own and has no id: it is left out.
  #word(word) {
    const chars = Array.from(word);
    if (chars.length > this.longest) return [this.unknown];
    const ids = [];
    for (let start = 0, end; start < chars.length; start = end) {
      let id;
      for (end = chars.length; end > start; end -= 1) {
        id = this.vocabulary.get((start ? this.prefix : '') + chars.slice(start, end).join(''));
        if (id !== undefined) break;
      }
      if (id === undefined) return [this.unknown];
      ids.push(id);
    }
    return ids.slice(0, -1);
  }
}

// A protobuf message: field number -> its values in order, BigInt for numbers, bytes for all else.
export function fields(bytes) {
  const found = new Map();
  let at = 0;
  const varint = () => {
    for (let value = 0n, shift = 0n; shift < 70n; shift += 7n) {
      const byte = bytes[at++] ?? 0;
      value |= BigInt(byte & 127) << shift;
      if (byte < 128) return BigInt.asIntN(64, value);
    }
    throw new Error('a number of this ONNX file does not end; fetch the artifact again');
  };
  while (at < bytes.length) {
    const key = Number(varint());
    const kind = key & 7;
    const size = { 1: 8, 2: 0, 5: 4 }[kind];
    let value;
    if (kind === 0) value = varint();
    else {
      const length = kind === 2 ? Number(varint()) : size;
      if (!(length >= 0 && at + length <= bytes.length))
        throw new Error('this is not an ONNX file, or it was cut off; fetch the artifact again');
      value = bytes.subarray(at, (at += length));
    }
    if (!found.has(key >> 3)) found.set(key >> 3, []);
    found.get(key >> 3).push(value);
  }
  return found;
}

const named = (messages, field) =>
  new Map(messages.map(fields).map((message) => [text(message.get(field)[0]), message]));

function need(map, name) {
  if (!map.has(name))
    throw new Error(`the tokenize plan holds no ${name}; this page reads another kind of plan: update it`);
  return map.get(name);
}
