// channels.js: the browser's side of webchannels.py. MIT License.
// One WebSocket carries all channels: bytes, and JSON (subprotocol webchannels.v1).
//   {channel, message, payload?, ref?}    to the server
//   {channel, message, payload?}          from the server
//   {ref, payload} or {ref, error}        its reply to a ref
//   {error, channel, message}             an error without ref
//   an empty message                      a keep-alive, answered by another

// A second copy in the page finds the first. (Object(x) is x, of any type.)
var WebChannels = /** @type {undefined} */ (Object(window).WebChannels) || (() => {
  const TICK = 5000           // ms
  const ASK = 5               // silent ticks until a keep-alive
  const DEAD = 7              // silent ticks until the connection counts as lost
  const DELAY = [1000, 30000] // ms within which to reconnect: at first, at most
  const QUEUE = [2048, 2**20] // messages and bytes that may wait for a connection

  const page = Object(window)
  const path = document.currentScript?.dataset.path || '/'
  const base = location.href // at first: the page may change it

  let state = /** @type {'connecting' | 'open' | 'reconnecting' | 'closed'} */ ('closed')
  let socket = /** @type {WebSocket | null} */ (null) // the only one
  let timer = 0     // to the next tick
  let silent = 0    // ticks since the server was heard
  let failures = 0  // in a row
  let lastRef = 0
  // An item is {data, ref, promise, resolve, reject}: of the reply or, without ref, the sending.
  const queue = new Map()         // items not sent yet -> bytes
  const pending = new Map()       // ref -> item not answered yet
  const subscriptions = new Map() // channel -> item

  /** False if a listener prevents the default. @param {string} type  @param {any} [detail] */
  const emit = (type, detail) =>
    client.dispatchEvent(new CustomEvent(type, { detail, cancelable: true }))

  const complain = (/** @type {object} */ detail) =>
    emit('error', detail) && console.error('WebChannels:', detail)

  const become = (/** @type {typeof state} */ next) => {
    document.documentElement.dataset.webchannels = state = next
    emit('state', next)
  }

  // ---- The connection, and what goes through it ----

  const connect = () => {
    silent = ASK // the handshake has a deadline, too
    try {
      socket = new WebSocket(new URL(path, base).href.replace('http', 'ws'), 'webchannels.v1')
    } catch (error) { // no URL, or one that this page may not use: trying again is no help
      complain({ error: String(error) })
      return end(1000)
    }
    socket.binaryType = 'arraybuffer'
    socket.onopen = opened
    socket.onmessage = received
    socket.onclose = ({ target, code, reason }) => target === socket && end(code, reason)
  }

  // Silence is counted, not timed: a hidden tab ticks late, a frozen one not at all, but each hears
  // what the server said before it ticks twice.
  const tick = () => {
    clearTimeout(timer)
    timer = setTimeout(tick, TICK)
    if (!socket) return connect()
    if (++silent >= DEAD) return end()
    if (socket.readyState !== WebSocket.OPEN) return
    failures = 0 // not before: a server may let us in and drop us
    if (silent === ASK) socket.send('')
  }

  /** Connects or asks the server now, unless that is under way. */
  const wake = () => {
    if (state === 'closed') return
    failures = 0
    if (socket && silent >= ASK) return
    silent = ASK - 1
    tick()
  }

  const opened = () => {
    silent = 0
    subscriptions.forEach(renew)
    for (const item of queue.keys()) send(item)
    queue.clear()
    become('open')
    emit('open')
  }

  const received = (/** @type {MessageEvent} */ { data }) => {
    silent = 0
    if (data === '') return
    const m = typeof data === 'string' ? JSON.parse(data) : { message: data }
    const item = pending.get(m.ref) // if it is still wanted
    const detail = 'payload' in m ? m : m.message
    if ('error' in m) m.ref ? item?.reject(new Error(m.error)) : complain(m)
    else if (m.ref) item?.resolve(m.payload)
    else if (emit('message', detail)) page.parse_payload(detail)
  }

  const end = (code = 1006, reason = '') => {
    const wasOpen = state === 'open'
    const next = code === 1000 || code === 1008 ? 'closed' : 'reconnecting' // the server's will
    clearTimeout(timer)
    socket?.close()
    socket = null
    for (const { reject } of pending.values()) reject(new DOMException('Lost', 'NetworkError'))
    if (next === 'closed') {
      for (const { reject } of queue.keys()) reject(new DOMException('Closed', 'AbortError'))
      queue.clear()
    } else {
      // Full jitter: a restarted server has all its clients coming, hidden tabs on the full second.
      const most = Math.min(DELAY[1], DELAY[0] * (document.hidden ? 10 : 1) * 2 ** failures++)
      timer = setTimeout(tick, Math.random() * most)
    }
    become(next) // last, for listeners may open() or close()
    if (wasOpen) emit('close', { code, reason })
  }

  const deferred = (/** @type {any} */ item) => {
    item.promise = new Promise((resolve, reject) => Object.assign(item, { resolve, reject }))
    return item
  }

  const send = (/** @type {any} */ item) => {
    if (socket?.readyState === WebSocket.OPEN) { // a closing one swallows it
      socket.send(item.data)
      if (item.ref) pending.set(item.ref, item)
      else item.resolve()
    } else if (state === 'closed') item.reject(new DOMException('Closed', 'AbortError'))
    else {
      const copy = new Blob([item.data]) // the caller may reuse its buffer
      if (typeof item.data !== 'string') item.data = copy
      const bytes = [...queue.values()].reduce((sum, size) => sum + size, copy.size)
      if (queue.size < QUEUE[0] && bytes <= QUEUE[1]) queue.set(item, copy.size)
      else item.reject(new DOMException('Queue full', 'QuotaExceededError'))
    }
    return item.promise
  }

  const renew = (/** @type {any} */ { resolve, reject }, /** @type {string} */ channel) =>
    client.request(channel, 'subscribe', undefined, { timeout: Infinity }).then(resolve)
      .then(() => emit('subscribed', channel), error => {
        if (error instanceof DOMException) return // lost: the next connection renews it
        subscriptions.delete(channel)
        reject(error)
        complain({ error: error.message, channel, message: 'subscribe' })
      })

  // ---- What the page uses ----

  /** Events and their `detail`: 'state', the new one; 'open'; 'close' {code, reason}; 'subscribed',
   * the channel; 'message', what parse_payload gets; 'error' {error, channel, message}. */
  class Client extends EventTarget {
    /** Also in `<html data-webchannels="...">`. */
    get state() { return state }

    /** Resolves when handed over; rejects when too much waits, or on close(). A reply is a push.
     * @param {string} channel  @param {string} message  @param {any} [payload] */
    async sendMessageTo(channel, message, payload) {
      return send(deferred({ data: JSON.stringify({ channel, message, payload }) }))
    }

    /** The same for bytes, to channel("/"). @param {BufferSource | Blob} data */
    async sendBinary(data) { return send(deferred({ data })) }

    /** Resolves with the reply. Rejects with the server's error, or a DOMException: TimeoutError,
     * AbortError, NetworkError (connection lost: nobody knows whether it ran).
     * @param {string} channel  @param {string} message  @param {any} [payload]
     * @param {{ timeout?: number, signal?: AbortSignal }} [options]  timeout in ms, or Infinity */
    async request(channel, message, payload, { timeout = 30000, signal } = {}) {
      signal?.throwIfAborted()
      const ref = ++lastRef
      const item = deferred({ ref, data: JSON.stringify({ channel, message, payload, ref }) })
      const late = setTimeout(item.reject, Math.min(timeout, 2e9),
        new DOMException('No reply in time', 'TimeoutError'))
      const abort = () => item.reject(signal?.reason)
      signal?.addEventListener('abort', abort)
      return send(item).finally(() => {
        clearTimeout(late)
        signal?.removeEventListener('abort', abort)
        queue.delete(item)
        pending.delete(ref)
      })
    }

    /** Gives pushes with a payload to `handler`, not to parse_payload, until the result is called.
     * @param {string} path  '/channel/message', where `:name` stands for any segment
     * @param {(payload: any, info: any) => void} handler  info: channel, message, the `:name`s */
    channel(path, handler) {
      const segments = path.split('/').map(segment => segment[0] === ':'
        ? `(?<${segment.split(':')[1]}>[^/]+)` : segment.replace(/\W/g, '\\$&'))
      const pattern = RegExp(`^${segments.join('/')}$`)
      const listener = (/** @type {any} */ event) => {
        const { channel, message, payload } = event.detail
        const match = pattern.exec(`/${channel}/${message}`)
        if (!match || payload === undefined) return
        event.preventDefault()
        handler(payload, { ...match.groups, channel, message })
      }
      client.addEventListener('message', listener)
      return () => client.removeEventListener('message', listener)
    }

    /** Lasts over reconnects. Resolves when the server confirms it, rejects when it refuses.
     * @param {string} channel  @returns {Promise<any>} */
    subscribe(channel) {
      if (subscriptions.has(channel)) return subscriptions.get(channel).promise
      const item = deferred({})
      item.promise.catch(() => { }) // renew() complains
      subscriptions.set(channel, item)
      if (state === 'open') renew(item, channel)
      return item.promise
    }

    /** @param {string} channel */
    async unsubscribe(channel) {
      subscriptions.get(channel)?.reject(new DOMException('Unsubscribed', 'AbortError'))
      subscriptions.delete(channel)
      if (state === 'open') return client.request(channel, 'unsubscribe')
    }

    /** Connects, at once. */
    open() {
      if (state === 'closed') become('connecting')
      wake()
    }

    /** Stays away until open(). Rejects what waits. */
    close() { end(1000) }
  }

  const client = new Client()
  // Captured, because 'resume' goes to the document.
  for (const type of ['online', 'offline', 'pageshow', 'resume']) addEventListener(type, wake, true)
  document.addEventListener('visibilitychange', () => document.hidden || wake())
  addEventListener('pagehide', e => e.persisted && state !== 'closed' && end()) // for the bfcache

  page.Genie = { ...page.Genie, WebChannels: client }
  page.parse_payload ||= (/** @type {any} */ payload) => {
    console.log(payload)
    console.log('Overwrite window.parse_payload to handle messages from the server')
  }

  client.open()
  return client
})()

WebChannels.subscribe(document.currentScript?.dataset.channel || '____')
  .then(() => console.log('Subscription ready'), () => { })
