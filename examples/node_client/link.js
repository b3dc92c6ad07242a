// The calls to the coordinator as promises: "Connection and credentials" and "The calls" of docs/protocol.md.

import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { fileURLToPath } from 'node:url';

import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';
import protobuf from 'protobufjs';

const PROTOS = fileURLToPath(new URL('../../protos/', import.meta.url));
const AS_WRITTEN = { keepCase: true, longs: String, enums: String, defaults: true, oneofs: true };
const PART_BYTES = 64 << 10; // of an upload: small parts lose little when a connection breaks
const TIMES_S = { Heartbeat: 10, Decline: 2, Upload: 600, Download: 600 };
const CALL_S = 30;

// An answer that is an error. `passes`: asking again later may help; `waitS`: not before.
export class CallError extends Error {
  constructor(method, error) {
    super(`${method}: ${grpc.status[error.code]}: ${error.details}`);
    const { UNAVAILABLE, DEADLINE_EXCEEDED, CANCELLED, RESOURCE_EXHAUSTED } = grpc.status;
    const again = error.metadata?.get('retry-after-s')[0];
    this.code = grpc.status[error.code];
    this.waitS = Number(again) || 0;
    this.passes =
      [UNAVAILABLE, DEADLINE_EXCEEDED, CANCELLED].includes(error.code) ||
      (error.code === RESOURCE_EXHAUSTED && again !== undefined);
  }
}

export const isLoopback = (coordinator) => /^(127\.\d+\.\d+\.\d+|\[::1\]|localhost):\d+$/.test(coordinator);

export class Link {
  #clients;
  #metadata = new grpc.Metadata();

  // Plaintext on loopback without `ca`; else TLS, by the system's authorities or those in the file `ca`.
  constructor(coordinator, ca) {
    const encrypted = ca || !isLoopback(coordinator);
    const credentials = encrypted
      ? grpc.credentials.createSsl(ca ? readFileSync(ca) : null)
      : grpc.credentials.createInsecure();
    const options = {
      'grpc.enable_http_proxy': 0,
      'grpc.initial_reconnect_backoff_ms': 200,
      'grpc.max_reconnect_backoff_ms': 5000,
    };
    const { Fleet, Distribution } = services();
    this.#clients = [Fleet, Distribution].map((Client) => new Client(coordinator, credentials, options));
    this.#metadata.set('pocketfed-instance', randomBytes(8).toString('hex'));
  }

  set token(token) {
    this.#metadata.set('authorization', `Bearer ${token}`);
  }

  close() {
    for (const client of this.#clients) client.close();
  }

  #start(method, seconds, begin) {
    const client = this.#clients.find((c) => method in c);
    return begin(client[method].bind(client), { deadline: Date.now() + 1000 * seconds });
  }

  // One request, one reply. `signal` ends the call.
  call(method, request, { seconds = TIMES_S[method] ?? CALL_S, signal = null } = {}) {
    return new Promise((resolve, reject) => {
      const call = this.#start(method, seconds, (send, options) =>
        send(request, this.#metadata, options, (error, reply) => {
          signal?.removeEventListener('abort', cancel);
          if (error) reject(new CallError(method, error));
          else resolve(reply);
        }),
      );
      const cancel = () => call.cancel();
      if (signal?.aborted) cancel();
      signal?.addEventListener('abort', cancel);
    });
  }

  // The chunks of the bytes with that digest, from `firstChunk` on.
  async *download(digest, firstChunk, signal) {
    const request = { digest, first_chunk: firstChunk };
    const call = this.#start('Download', TIMES_S.Download, (send, options) => send(request, this.#metadata, options));
    const cancel = () => call.cancel();
    signal.addEventListener('abort', cancel);
    try {
      signal.throwIfAborted();
      for await (const { data } of call) yield data;
    } catch (error) {
      throw error.code in grpc.status ? new CallError('Download', error) : error;
    } finally {
      signal.removeEventListener('abort', cancel);
      call.cancel(); // whoever stops reading must not leave the coordinator sending
    }
  }

  // Hand in `data`, from where an earlier try ended. `tell` hears where that is.
  async upload(header, data, tell) {
    const { received_bytes: received, receipt } = await this.call('GetUploadStatus', {
      assignment_id: header.assignment_id,
    });
    if (receipt) return receipt;
    const offset = Number(received);
    tell(offset);
    return new Promise((resolve, reject) => {
      const call = this.#start('Upload', TIMES_S.Upload, (send, options) =>
        send(this.#metadata, options, (error, reply) =>
          error ? reject(new CallError('Upload', error)) : resolve(reply),
        ),
      );
      call.write({ header: { ...header, offset } });
      let at = offset;
      const more = () => {
        while (at < data.length) {
          const part = data.subarray(at, (at += PART_BYTES));
          if (!call.write({ data: part })) return void call.once('drain', more);
        }
        call.end();
      };
      more();
    });
  }
}

function services() {
  const root = new protobuf.Root();
  root.resolvePath = (_, target) => join(PROTOS, basename(target)); // they import each other as pocketfed/protos/...
  root.loadSync('fleet.proto', { keepCase: true });
  root.loadSync('distribution.proto', { keepCase: true });
  return grpc.loadPackageDefinition(protoLoader.fromJSON(root.toJSON(), AS_WRITTEN)).pocketfed.v1;
}
