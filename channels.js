// (c) 2026 webchannels contributors. SPDX-License-Identifier: MIT
var parse_payload = /** @type {(payload: any) => void} */ (Object(globalThis).parse_payload)
var Genie = /** @type {{ WebChannels: typeof WebChannels }} */ (Object(globalThis).Genie)
var WebChannels = (() => {
  if (typeof document === 'undefined') throw new Error('channels.js works in pages only')

  const TICK = 5000 // ms
  const TRUST = 5   // ticks without a word until the server is asked; it has two to answer

  const page = Object(window)
  const { origin } = page
  // Elements with a name hide what the document has.
  const ofDocument = (name = '') => Reflect.get(Document.prototype, name, document)
  const script = { __proto__: null, ...ofDocument('currentScript')?.dataset } // its own only
  const base = origin === 'null' ? location.href : origin // about:srcdoc is no base
  let address = script.path || '/'
  try { address = new URL(address, base).href.replace(/^http/, 'ws') } catch { } // connect() tells

  let state = /** @type {'connecting' | 'open' | 'reconnecting' | 'closed'} */ ('closed')
  let socket = /** @type {any} */ (null)
  let trust = 0 // ticks until the server is asked for a word; below 0: ticks since then
  let timer = 0, failures = 0, lastRef = 0, hinted = 0
  // {data, ref, promise, resolve, reject}: of the reply or, without ref, the sending
  const queue = new Set()    // not sent yet
  const requests = new Map() // by ref: not answered yet
  // {channel, promise, resolve, reject, timer, failures (once confirmed)}
  const subscriptions = new Map() // by channel: what the page wants of each connection
  const places = new Map() // by channel that is kept: 'epoch.number' of what the page has

  // ---- To the page: its listeners may open() or close() ----
  // False: a listener prevented it.
  const emit = (type = '', detail = /** @type {any} */ (null), channel = '') => client
    .dispatchEvent(Object.assign(new CustomEvent(type, { detail, cancelable: true }), { channel }))
  const complain = (/** @type {any} */ detail) =>
    emit('error', detail) && console.error('WebChannels:', detail)

  const enter = (/** @type {any} */ next, type = '', detail = {}) => {
    const before = state
    state = next
    ofDocument('documentElement')?.setAttribute('data-webchannels', next)
    if (type) emit(type, detail)
    if (before !== next && state === next) emit('state', next)
  }

  const deliver = (/** @type {any} */ push) => {
    const { channel, message, payload } = push
    const detail = payload === undefined ? message : push
    let untaken = emit('message', detail, channel)
    // No slash in the message: /a + b/c is not /a/b + c.
    for (const type of /\//.test(message) ? [] : [`/${channel}/${message}`, '/:'])
      untaken = emit(type, push) && untaken
    if (untaken) page.parse_payload(detail)
  }

  // ---- The connection ----
  const canSend = () => socket?.readyState === 1 // wrappers of WebSocket have no OPEN
  // Full jitter: a restarted server has them all coming.
  const delay = (failures = 0) => Math.random() * Math.min(
    30000, 1000 * (ofDocument('hidden') || origin === 'null' ? 10 : 1) * 2 ** failures) // ms

  const connect = () => {
    trust = 0 // the handshake asks, too
    try {
      const opening = socket = new WebSocket(address, 'webchannels.v1')
      opening.binaryType = 'arraybuffer'
      opening.onopen = opened
      opening.onmessage = received
      opening.onclose = ({ code, reason }) => opening === socket && disconnect(code, reason)
    } catch (error) { disconnect(1000, String(error)) }
  }

  // Ticks, not times: hidden tabs tick late, frozen ones never, but hear before they tick.
  const tick = () => {
    clearTimeout(timer)
    timer = setTimeout(tick, TICK)
    if (!socket) return connect()
    if (canSend()) failures = 0 // not before: a server may let us in and drop us
    if (--trust === 0 && canSend()) transmit('')
    if (trust < -1) disconnect(1006, 'no sign of life')
  }

  const wake = () => {
    failures = 0
    if (state === 'closed' || socket && trust <= 0) return // it is under way
    trust = 1
    tick()
  }

  const opened = () => {
    trust = TRUST
    subscriptions.forEach(renew)
    for (const frame of queue) if (canSend() && queue.delete(frame)) send(frame)
    if (canSend()) enter('open', 'open')
  }

  const received = (/** @type {any} */ { data }) => {
    trust = TRUST
    emit('debug', { in: data })
    if (data === '') return
    const end = data.byteLength && new Uint8Array(data).indexOf(10) // where its envelope ends
    const frame = JSON.parse(end ? new TextDecoder().decode(data.slice(0, end)) : data)
    const { channel, message, ref, error, at, n } = frame
    const place = places.get(channel)
    if (n <= place?.split('.')[1]) return // it comes twice
    if (at || n) places.set(channel, at || place?.replace(/\d+$/, n))
    if (at && place && place !== at) emit('missed', channel)
    if (end) frame[channel && message == null ? 'message' : 'payload'] = data.slice(end + 1)
    const request = requests.get(ref) // if it is still wanted
    if (!ref) error == null ? 'message' in frame && deliver(frame) : complain(frame)
    else if (error == null) request?.resolve(frame.payload)
    else request?.reject(Object.assign(Error(error), { name: 'ChannelError' }))
  }

  const disconnect = (code = 1006, reason = '') => {
    if (state === 'closed') return
    const final = code === 1000 || code === 1008 // the will of the page or the server
    const opened = state === 'open'
    const wait = final ? undefined : delay(failures++)
    clearTimeout(timer)
    if (!final) timer = setTimeout(tick, wait)
    socket?.close()
    socket = null
    for (const { reject } of requests.values())
      reject(failure(`Lost: ${code} ${reason}`, 'NetworkError'))
    if (final) {
      for (const { reject } of [...queue, ...subscriptions.values()])
        reject(failure(`Closed: ${code} ${reason}`))
      subscriptions.forEach(deferred) // open() asks for them again
      queue.clear()
    }
    enter(final ? 'closed' : 'reconnecting', 'close', { code, reason, opened, wait })
    if (!final) emit('debug', { wait })
    const why = origin === 'null' && !opened && failures < 2 // a sandbox or a file
      ? 'see config.base_path, allowed_origins' : (final || code > 1006) && reason
    if (why) complain({ error: `${address}: ${why}` })
  }

  const transmit = (/** @type {any} */ out) => {
    trust = Math.min(trust, 1) // then the next tick asks
    socket.send(out)
    emit('debug', { out })
  }
  const failure = (why = '', name = 'AbortError') => new DOMException(why.trim(), name)
  const deferred = (/** @type {any} */ more) => {
    more.promise = new Promise((resolve, reject) => Object.assign(more, { resolve, reject }))
    more.promise.catch(() => { }) // renew() complains
    return more
  }

  const framed = (/** @type {any} */ envelope, /** @type {any} */ payload) => deferred({
    ref: envelope.ref,
    data: ArrayBuffer.isView(payload) || /(Blob|File|yBuffer)]/.test({}.toString.call(payload))
      ? new Blob([JSON.stringify(envelope), '\n', payload]) // a copy
      : JSON.stringify({ ...envelope, payload })
  })
  const send = (/** @type {any} */ frame) => {
    if (canSend()) {
      if (frame.ref) requests.set(frame.ref, frame)
      else frame.resolve()
      transmit(frame.data)
    } else if (state === 'closed') frame.reject(failure('Closed'))
    else {
      let total = 0
      for (const { data } of [frame, ...queue]) total += data.size ?? data.length
      if (queue.size < 2048 && total <= 2**20) queue.add(frame)
      else frame.reject(failure('Queue full', 'QuotaExceededError'))
    }
    return frame.promise
  }

  const renew = (/** @type {any} */ subscription) => {
    if (!canSend()) return
    const { channel } = subscription
    const wanted = () => subscriptions.get(channel) === subscription
    clearTimeout(subscription.timer)
    client.request(channel, 'subscribe', undefined, { timeout: Infinity }).then(reply => {
      if (!wanted()) return
      Object.assign(subscription, { failures: 0 }).resolve(reply)
      emit('subscribed', channel)
    }, error => {
      if (!wanted() || error instanceof DOMException) return // lost: opened() renews it
      if (subscription.failures >= 0 && /^ERROR : 5/.test(error.message)) {
        const wait = delay(subscription.failures++)
        subscription.timer = setTimeout(() => wanted() && renew(subscription), wait)
        emit('debug', { wait, channel })
      } else if (subscriptions.delete(channel)) subscription.reject(error)
      complain({ error: error.message, channel, message: 'subscribe' })
    })
  }

  /** @typedef {(type: string, listener: (event: CustomEvent & { channel: string }) => void,
   *   options?: any) => void} Listen
   * @typedef {{ addEventListener: Listen, removeEventListener: Listen } & EventTarget} Target */
  class Client extends /** @type {new () => Target} */ (EventTarget) {
    get address() { return address }
    get state() { return state }

    /** @param {string} channel  @param {string} message  @param {any} [payload] */
    async sendMessageTo(channel, message, payload) {
      return send(framed({ channel, message }, payload))
    }

    /** @param {string} channel  @param {string} message  @param {any} [payload]
     * @param {{ timeout?: number, signal?: AbortSignal }} [options]  timeout in ms, or Infinity */
    async request(channel, message, payload, { timeout = 30000, signal } = {}) {
      if (!(timeout > 0)) throw new RangeError(`a timeout is above 0 ms, not ${timeout}`)
      signal?.throwIfAborted()
      const since = message === 'subscribe' ? places.get(channel) : undefined
      const frame = framed({ channel, message, ref: ++lastRef, since }, payload)
      const timer = setTimeout(
        frame.reject, Math.min(timeout, 2e9), failure('No reply in time', 'TimeoutError'))
      const abort = () => frame.reject(signal?.reason)
      signal?.addEventListener('abort', abort)
      return send(frame).finally(() => {
        clearTimeout(timer)
        signal?.removeEventListener('abort', abort)
        queue.delete(frame)
        requests.delete(frame.ref)
      })
    }

    /** Gives pushes with a payload to `handler` until the result is called.
     * @param {string} path  '/channel/message', with `:name`, `:n::int`, `:x::float`
     * @param {(payload: any, info: any) => void} handler  info: channel, message, the `:name`s */
    channel(path, handler) {
      if (!/^(\/(:\w+(::(int|float|str))?|[^:/][^/]*)){2,}$/.test(path)
        || typeof handler !== 'function')
        throw new TypeError(`not a path '/channel/message' and a handler: ${path}, ${handler}`)
      const kinds = Object({ int: '-?\\d+', float: '-?\\d+(\\.\\d+)?' })
      const pattern = RegExp(`^${path.replace(/\/:(\w+)(?:::(\w+))?|\W/g, (text, name, kind) =>
        name ? `/(?<${name}>${kinds[kind] ?? '[^/]+'})` : `\\${text}`)}$`)
      const listener = (/** @type {any} */ event) => {
        const { channel, message, payload } = event.detail
        const match = pattern.exec(`/${channel}/${message}`)
        if (match && payload !== undefined) {
          const info = /** @type {any} */ ({ ...match.groups })
          for (const [, name] of path.matchAll(/\/:(\w+)::[if]/g)) info[name] = Number(info[name])
          event.preventDefault()
          handler(payload, { ...info, channel, message })
        } else if (!path.includes('/:') && !hinted++)
          console.warn(`${path} went to parse_payload: give it a payload, None will do`)
      }
      const type = path.includes('/:') ? '/:' : path
      client.addEventListener(type, listener)
      return () => client.removeEventListener(type, listener)
    }

    /** Lasts over reconnects. @param {string} channel  @returns {Promise<any>} */
    subscribe(channel) {
      let subscription = subscriptions.get(channel)
      if (!subscription) {
        subscriptions.set(channel, subscription = deferred({ channel }))
        renew(subscription)
      }
      return state === 'closed' ? Promise.reject(failure('Closed')) : subscription.promise
    }
    /** @param {string} channel */
    async unsubscribe(channel) {
      subscriptions.get(channel)?.reject(failure('Unsubscribed'))
      subscriptions.delete(channel)
      if (canSend()) await client.request(channel, 'unsubscribe', undefined, { timeout: Infinity })
        .catch(error => { if (!(error instanceof DOMException)) throw error }) // lost: it succeeded
    }

    open() {
      if (state === 'closed') enter('connecting')
      wake()
    }
    close() { disconnect(1000) }
  }

  const first = Object.hasOwn(page, 'WebChannels') && page.WebChannels // of a copy before this
  const client = /** @type {Client} */ (first || new Client())
  if (!first) {
    for (const type of ['online', 'offline', 'pageshow', 'resume'])
      addEventListener(type, wake, true) // some go to the document
    addEventListener('visibilitychange', () => ofDocument('hidden') || wake(), true)
    // In the bfcache a page hears nothing.
    for (const type of ['freeze', 'pagehide']) addEventListener(type, event => {
      if (socket && Object(event).persisted !== false) disconnect(1006, type)
    }, true)
    addEventListener('securitypolicyviolation', ({ blockedURI, disposition }) => {
      if (blockedURI && address.startsWith(blockedURI) && disposition === 'enforce' && !canSend())
        disconnect(1000, 'forbidden by the Content-Security-Policy')
    }, true)
    page.WebChannels = client
    page.Genie = { ...page.Genie, WebChannels: client }
    if (typeof page.parse_payload !== 'function') page.parse_payload = (payload = '') => {
      console.log(payload)
      console.log('Overwrite window.parse_payload to handle messages from the server')
    }
    client.open()
  }
  if (client.address === address) client.subscribe(script.channel || '____')
    .then(() => console.log('Subscription ready'), () => { })
  else complain({ error: `connected to ${client.address}, so not to ${address}` })
  return client
})()
