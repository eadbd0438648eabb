//! A fake adapter for tests: libibverbs' functions, with queue pairs that deliver to each other inside this
//! process.
//!
//! It also notices what a real one cannot tell: memory that is deregistered while there is a queue pair that
//! was given it ([`Usage::dangling`]). Completions of a queue pair stay in their queues when it is destroyed,
//! as real ones may.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::{c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::context::{Context, SharedContext};
use super::ffi::{self, SEND_SIGNALED, WC_WITH_IMM, Wc, mask, state, status};
use super::library::Library;

static LIBRARY: Library = Library {
    get_device_list,
    free_device_list,
    get_device_name,
    open_device,
    close_device,
    query_device,
    query_port,
    get_async_event,
    ack_async_event,
    event_type_str: text,
    alloc_pd,
    dealloc_pd,
    reg_mr,
    dereg_mr,
    create_comp_channel,
    destroy_comp_channel,
    create_cq,
    destroy_cq,
    get_cq_event,
    ack_cq_events,
    create_qp,
    modify_qp,
    destroy_qp,
    wc_status_str: text,
};

/// All objects, by their addresses or numbers.
static OBJECTS: Mutex<Objects> = Mutex::new(Objects {
    next: 1,
    events: BTreeMap::new(),
    channels: BTreeMap::new(),
    queues: BTreeMap::new(),
    memory: BTreeMap::new(),
    pairs: BTreeMap::new(),
    dangling: Vec::new(),
});

struct Objects {
    /// Numbers queue pairs and memory.
    next: u32,
    /// By context: the descriptor of asynchronous events, of which there are none.
    events: BTreeMap<usize, EventFd>,
    channels: BTreeMap<usize, Events>,
    queues: BTreeMap<usize, Queue>,
    /// By key of registered memory: its context.
    memory: BTreeMap<u32, usize>,
    pairs: BTreeMap<u32, Pair>,
    /// With the context concerned.
    dangling: Vec<(usize, String)>,
}

struct Events {
    descriptor: EventFd,
    /// Completion queues that have something new, with their users' words.
    raised: VecDeque<(usize, usize)>,
}

struct Queue {
    channel: usize,
    user: usize,
    /// Asked to raise an event: for any completion, or for failed ones only.
    armed: Option<bool>,
    completions: VecDeque<Wc>,
}

struct Pair {
    context: usize,
    send: usize,
    receive: usize,
    peer: u32,
    broken: bool,
    receives: VecDeque<(u64, ffi::Sge)>,
    /// The keys of memory that it was ever given.
    given: BTreeSet<u32>,
}

/// An opened fake device.
pub fn context() -> SharedContext {
    let events = eventfd();
    let raw = object::<ffi::Context>();
    // SAFETY: a fresh allocation of that size, nobody else's; the fields written are plain pointers and a
    // number.
    unsafe {
        (*raw).poll_cq = poll_cq;
        (*raw).req_notify_cq = req_notify_cq;
        (*raw).post_send = post_send;
        (*raw).post_recv = post_recv;
        (*raw).async_fd = events.as_raw_fd();
    }
    base::lock(&OBJECTS).events.insert(raw.addr(), events);
    Arc::new(Context::of(raw, "fake0".into(), &LIBRARY))
}

/// What there is of a device.
#[derive(Debug, Eq, PartialEq)]
pub struct Usage {
    /// Registered memory.
    pub memory: usize,
    /// Queue pairs.
    pub pairs: usize,
    /// Memory that went before a queue pair that was given it, so far.
    pub dangling: Vec<String>,
}

/// What there is of a device now.
pub fn usage(context: &Context) -> Usage {
    let (objects, context) = (base::lock(&OBJECTS), context.raw().addr());
    let dangling = objects.dangling.iter().filter(|(of, _)| *of == context);
    Usage {
        memory: objects.memory.values().filter(|of| **of == context).count(),
        pairs: objects.pairs.values().filter(|pair| pair.context == context).count(),
        dangling: dangling.map(|(_, what)| what.clone()).collect(),
    }
}

fn eventfd() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).expect("descriptors are left")
}

/// Zeroed memory for one of the library's objects.
fn object<T>() -> *mut T {
    Box::into_raw(Box::new(MaybeUninit::<T>::zeroed())).cast()
}

/// # Safety
/// From [`object`] with the same type, and not freed before.
unsafe fn free<T>(object: *mut T) {
    // SAFETY: the caller's promise.
    drop(unsafe { Box::from_raw(object.cast::<MaybeUninit<T>>()) });
}

fn again() -> c_int {
    Errno::EAGAIN.set();
    -1
}

impl Objects {
    fn number(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    fn complete(&mut self, queue: usize, completion: Wc) {
        let Some(found) = self.queues.get_mut(&queue) else { return };
        found.completions.push_back(completion);
        let wanted =
            found.armed.is_some_and(|failed_only| !failed_only || completion.status != status::SUCCESS);
        if wanted {
            found.armed = None;
            let (channel, user) = (found.channel, found.user);
            let events = self.channels.get_mut(&channel).expect("a queue's channel outlives it");
            events.raised.push_back((queue, user));
            events.descriptor.write(1).expect("it is not full");
        }
    }

    /// The pair fails: what it was given and has not used comes back.
    fn fail(&mut self, number: u32) {
        let Some(pair) = self.pairs.get_mut(&number) else { return };
        pair.broken = true;
        let queue = pair.receive;
        for (id, _) in std::mem::take(&mut pair.receives) {
            self.complete(queue, completion(id, status::WR_FLUSH_ERR, number));
        }
    }

    /// Sends a message; the status that its sender sees.
    fn deliver(&mut self, from: u32, bytes: &[u8], immediate: u32) -> u32 {
        let Some(pair) = self.pairs.get(&from) else { return status::WR_FLUSH_ERR };
        if pair.broken {
            return status::WR_FLUSH_ERR;
        }
        let to = pair.peer;
        let Some(peer) = self.pairs.get_mut(&to).filter(|peer| !peer.broken && peer.peer == from) else {
            return status::RETRY_EXC_ERR;
        };
        let Some((id, sge)) = peer.receives.pop_front() else { return status::RNR_RETRY_EXC_ERR };
        assert!(bytes.len() <= sge.length as usize, "a message fits its slot");
        let queue = peer.receive;
        let context = peer.context;
        if self.memory.contains_key(&sge.lkey) {
            // SAFETY: memory that was given to the pair and is registered, so mapped; its user reads it after
            // the completion.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), sge.addr as *mut u8, bytes.len()) };
        } else {
            let what = format!("queue pair {to} received into memory {} that is gone", sge.lkey);
            self.dangling.push((context, what));
        }
        let mut received = completion(id, status::SUCCESS, to);
        (received.byte_len, received.imm_data, received.wc_flags) =
            (bytes.len() as u32, immediate, WC_WITH_IMM);
        self.complete(queue, received);
        status::SUCCESS
    }
}

fn completion(id: u64, status: u32, pair: u32) -> Wc {
    let mut completion = Wc::default();
    (completion.wr_id, completion.status, completion.qp_num) = (id, status, pair);
    completion
}

unsafe extern "C" fn get_device_list(_: *mut c_int) -> *mut *mut ffi::Device {
    std::ptr::null_mut()
}

unsafe extern "C" fn free_device_list(_: *mut *mut ffi::Device) {}

unsafe extern "C" fn get_device_name(_: *mut ffi::Device) -> *const c_char {
    std::ptr::null()
}

unsafe extern "C" fn open_device(_: *mut ffi::Device) -> *mut ffi::Context {
    std::ptr::null_mut()
}

unsafe extern "C" fn close_device(context: *mut ffi::Context) -> c_int {
    base::lock(&OBJECTS).events.remove(&context.addr());
    // SAFETY: from `context`, closed once.
    unsafe { free(context) };
    0
}

unsafe extern "C" fn query_device(_: *mut ffi::Context, _: *mut ffi::DeviceAttr) -> c_int {
    Errno::EINVAL as c_int
}

unsafe extern "C" fn query_port(_: *mut ffi::Context, _: u8, attr: *mut ffi::PortAttr) -> c_int {
    // SAFETY: the caller's structure. InfiniBand (link layer 1), MTU 4096.
    unsafe {
        ((*attr).state, (*attr).active_mtu, (*attr).lid, (*attr).link_layer) = (ffi::PORT_ACTIVE, 5, 1, 1)
    };
    0
}

unsafe extern "C" fn get_async_event(_: *mut ffi::Context, _: *mut ffi::AsyncEvent) -> c_int {
    again()
}

unsafe extern "C" fn ack_async_event(_: *mut ffi::AsyncEvent) {}

unsafe extern "C" fn text(_: u32) -> *const c_char {
    c"fake".as_ptr()
}

unsafe extern "C" fn alloc_pd(context: *mut ffi::Context) -> *mut ffi::Pd {
    let pd = object::<usize>();
    // SAFETY: a fresh allocation of that size.
    unsafe { *pd = context.addr() };
    pd.cast()
}

unsafe extern "C" fn dealloc_pd(pd: *mut ffi::Pd) -> c_int {
    // SAFETY: from `alloc_pd`, freed once.
    unsafe { free(pd.cast::<usize>()) };
    0
}

unsafe extern "C" fn reg_mr(pd: *mut ffi::Pd, _: *mut c_void, _: usize, _: c_int) -> *mut ffi::Mr {
    let mut objects = base::lock(&OBJECTS);
    let key = objects.number();
    // SAFETY: from `alloc_pd`.
    objects.memory.insert(key, unsafe { *pd.cast::<usize>() });
    let mr = object::<ffi::Mr>();
    // SAFETY: a fresh allocation of that size.
    unsafe { (*mr).lkey = key };
    mr
}

unsafe extern "C" fn dereg_mr(mr: *mut ffi::Mr) -> c_int {
    let mut objects = base::lock(&OBJECTS);
    // SAFETY: from `reg_mr`.
    let key = unsafe { (*mr).lkey };
    let context = objects.memory.remove(&key).expect("it is registered");
    let users = objects.pairs.iter().filter(|(_, pair)| pair.given.contains(&key));
    let what = |pair: &u32| format!("memory {key} went before queue pair {pair}, which was given it");
    let dangling: Vec<_> = users.map(|(pair, _)| (context, what(pair))).collect();
    objects.dangling.extend(dangling);
    // SAFETY: from `reg_mr`, freed once.
    unsafe { free(mr) };
    0
}

unsafe extern "C" fn create_comp_channel(_: *mut ffi::Context) -> *mut ffi::CompChannel {
    let channel = object::<ffi::CompChannel>();
    let events = Events { descriptor: eventfd(), raised: VecDeque::new() };
    let fd: RawFd = events.descriptor.as_raw_fd();
    // SAFETY: a fresh allocation of that size.
    unsafe { (*channel).fd = fd };
    base::lock(&OBJECTS).channels.insert(channel.addr(), events);
    channel
}

unsafe extern "C" fn destroy_comp_channel(channel: *mut ffi::CompChannel) -> c_int {
    base::lock(&OBJECTS).channels.remove(&channel.addr());
    // SAFETY: from `create_comp_channel`, freed once.
    unsafe { free(channel) };
    0
}

unsafe extern "C" fn create_cq(
    context: *mut ffi::Context,
    _: c_int,
    user: *mut c_void,
    channel: *mut ffi::CompChannel,
    _: c_int,
) -> *mut ffi::Cq {
    let queue = object::<ffi::Cq>();
    // SAFETY: a fresh allocation of that size.
    unsafe { (*queue).context = context };
    let made =
        Queue { channel: channel.addr(), user: user.addr(), armed: None, completions: VecDeque::new() };
    base::lock(&OBJECTS).queues.insert(queue.addr(), made);
    queue
}

unsafe extern "C" fn destroy_cq(queue: *mut ffi::Cq) -> c_int {
    base::lock(&OBJECTS).queues.remove(&queue.addr());
    // SAFETY: from `create_cq`, freed once.
    unsafe { free(queue) };
    0
}

unsafe extern "C" fn get_cq_event(
    channel: *mut ffi::CompChannel,
    queue: *mut *mut ffi::Cq,
    user: *mut *mut c_void,
) -> c_int {
    let mut objects = base::lock(&OBJECTS);
    let events = objects.channels.get_mut(&channel.addr()).expect("an open channel");
    let Some((found, word)) = events.raised.pop_front() else { return again() };
    if events.raised.is_empty() {
        events.descriptor.read().expect("an event was raised");
    }
    // SAFETY: the caller's variables.
    unsafe { (*queue, *user) = (found as *mut ffi::Cq, word as *mut c_void) };
    0
}

unsafe extern "C" fn ack_cq_events(_: *mut ffi::Cq, _: u32) {}

unsafe extern "C" fn create_qp(_: *mut ffi::Pd, attr: *mut ffi::QpInitAttr) -> *mut ffi::Qp {
    let mut objects = base::lock(&OBJECTS);
    let number = objects.number();
    let pair = object::<ffi::Qp>();
    // SAFETY: a fresh allocation of that size, and the caller's structure with its open queues.
    let (context, send, receive) = unsafe {
        ((*pair).context, (*pair).qp_num) = ((*(*attr).send_cq).context, number);
        ((*pair).context.addr(), (*attr).send_cq.addr(), (*attr).recv_cq.addr())
    };
    let (receives, given) = (VecDeque::new(), BTreeSet::new());
    objects.pairs.insert(number, Pair { context, send, receive, peer: 0, broken: false, receives, given });
    pair
}

unsafe extern "C" fn modify_qp(pair: *mut ffi::Qp, attr: *mut ffi::QpAttr, fields: c_int) -> c_int {
    let mut objects = base::lock(&OBJECTS);
    // SAFETY: an open queue pair, and the caller's structure.
    let (number, attr) = unsafe { ((*pair).qp_num, *attr) };
    if fields & mask::DEST_QPN != 0 {
        objects.pairs.get_mut(&number).expect("it is open").peer = attr.dest_qp_num;
    }
    if attr.qp_state == state::ERR {
        objects.fail(number);
    }
    0
}

unsafe extern "C" fn destroy_qp(pair: *mut ffi::Qp) -> c_int {
    // SAFETY: an open queue pair.
    let number = unsafe { (*pair).qp_num };
    base::lock(&OBJECTS).pairs.remove(&number);
    // SAFETY: from `create_qp`, freed once.
    unsafe { free(pair) };
    0
}

unsafe extern "C" fn poll_cq(queue: *mut ffi::Cq, most: c_int, into: *mut Wc) -> c_int {
    let mut objects = base::lock(&OBJECTS);
    let completions = &mut objects.queues.get_mut(&queue.addr()).expect("it is open").completions;
    let count = completions.len().min(most as usize);
    for (at, completion) in completions.drain(..count).enumerate() {
        // SAFETY: the caller's array of `most` entries.
        unsafe { *into.add(at) = completion };
    }
    count as c_int
}

unsafe extern "C" fn req_notify_cq(queue: *mut ffi::Cq, failed_only: c_int) -> c_int {
    base::lock(&OBJECTS).queues.get_mut(&queue.addr()).expect("it is open").armed = Some(failed_only != 0);
    0
}

unsafe extern "C" fn post_send(pair: *mut ffi::Qp, wr: *mut ffi::SendWr, _: *mut *mut ffi::SendWr) -> c_int {
    let mut objects = base::lock(&OBJECTS);
    // SAFETY: an open queue pair and one valid request, whose memory, if it has any, is mapped during the
    // call.
    let (number, wr, bytes) = unsafe {
        let sge = &*(*wr).sg_list;
        let bytes = match (*wr).num_sge {
            0 => &[],
            _ => std::slice::from_raw_parts(sge.addr as *const u8, sge.length as usize),
        };
        ((*pair).qp_num, &*wr, bytes)
    };
    let status = objects.deliver(number, bytes, wr.imm_data);
    let queue = objects.pairs[&number].send;
    if status != status::SUCCESS || wr.send_flags & SEND_SIGNALED != 0 {
        objects.complete(queue, completion(wr.wr_id, status, number));
    }
    if status != status::SUCCESS {
        objects.fail(number);
    }
    0
}

unsafe extern "C" fn post_recv(pair: *mut ffi::Qp, wr: *mut ffi::RecvWr, _: *mut *mut ffi::RecvWr) -> c_int {
    let mut objects = base::lock(&OBJECTS);
    // SAFETY: an open queue pair.
    let number = unsafe { (*pair).qp_num };
    let mut next = wr;
    // SAFETY: a chain of valid requests that ends in null.
    while let Some(wr) = unsafe { next.as_ref() } {
        // SAFETY: each has one entry.
        let sge = unsafe { *wr.sg_list };
        let pair = objects.pairs.get_mut(&number).expect("it is open");
        pair.given.insert(sge.lkey);
        if pair.broken {
            let queue = pair.receive;
            objects.complete(queue, completion(wr.wr_id, status::WR_FLUSH_ERR, number));
        } else {
            pair.receives.push_back((wr.wr_id, sge));
        }
        next = wr.next;
    }
    0
}
