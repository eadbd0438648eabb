//! Reliable-connected queue pairs.

use std::collections::VecDeque;
use std::ffi::c_int;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::check;
use super::ffi::{
    self, AhAttr, QPT_RC, QpAttr, QpCap, QpInitAttr, RecvWr, SEND_INLINE, SEND_SIGNALED, SendWr, Sge,
    WR_SEND_WITH_IMM, mask, state,
};
use super::library::Library;
use super::memory::Pd;
use super::receive::{BATCH, ReceiveMemory, ReceiveQueue, Share, SpentShare};
use super::send::{SendQueue, SendSlot, Sent, work_id};

/// How to reach the peer's queue pair.
#[derive(Copy, Clone, Debug, Default)]
pub struct Route {
    /// This side's port, from 1.
    pub port: u8,
    /// `enum ibv_mtu`, the smaller one of both sides.
    pub mtu: u32,
    /// The peer's queue pair.
    pub qpn: u32,
    /// The peer's LID; InfiniBand only.
    pub lid: u16,
    /// The peer's GID, and this side's GID index; RoCE, and InfiniBand across subnets.
    pub gid: Option<([u8; 16], u8)>,
    /// InfiniBand service level, or RoCE priority, 0 to 15.
    pub service_level: u8,
    /// Transmissions beyond the first before the connection fails, 0 to 6.
    pub retries: u8,
    /// First packet number that is received.
    pub receive_psn: u32,
    /// First packet number that is sent.
    pub send_psn: u32,
}

/// How long the peer's adapter may take to acknowledge, as the exponent of 4.096 us: 134 ms (IBA vol. 1,
/// 9.7.6.1.3; adapters may take up to four times that).
const ACK_TIMEOUT: u8 = 15;
/// Transmissions beyond the first before the connection fails: a second, and four where adapters take so
/// long. Not 7, the most that there is: to soft-RoCE (Linux, rxe_comp.c) that means without end.
pub const RETRIES: u8 = 6;
/// The same where there is another rail to go on over: half of that.
pub const RAIL_RETRIES: u8 = 3;
/// Times that the peer may be without a receive slot, which credits rule out.
const RNR_RETRIES: u8 = 6;
/// The pause that a sender without receive slot is asked for: code 12 is 0.64 ms.
const RNR_TIMER: u8 = 12;

/// A message to send.
pub struct Message<'a> {
    /// Its four bytes beside the data.
    pub immediate: u32,
    /// Its data.
    pub data: Data<'a>,
    /// Whether its [`Sent`] is wanted; that of a failed one comes all the same.
    pub signaled: bool,
}

/// Where a message's data is.
pub enum Data<'a> {
    /// Copied by the call; at most [`Qp::max_inline`] bytes.
    Inline(&'a [u8]),
    /// In a slot.
    Slot(SendSlot),
}

/// Queue pairs made so far in this process, from 1.
static MADE: AtomicU64 = AtomicU64::new(1);

/// What the queue pairs of a lane have in common: their domain and their completion queues.
#[derive(Clone)]
pub struct Queues {
    /// The protection domain of all their memory.
    pub pd: Arc<Pd>,
    /// Where they say what they have sent.
    pub send: Arc<SendQueue>,
    /// What they receive into.
    pub receive: Arc<ReceiveMemory>,
}

/// A reliable-connected queue pair. It owns the memory that its device may read or write on its behalf.
pub struct Qp {
    /// Null once it is destroyed.
    raw: *mut ffi::Qp,
    max_inline: usize,
    /// Unique in the process.
    id: u64,
    /// Its user's number for it.
    user: u16,
    /// Sends that were posted and not seen to be finished, oldest first.
    in_flight: VecDeque<Flight>,
    /// The slots that it receives into, once it is bound.
    share: Option<Share>,
    queues: Queues,
}

/// A send that is not finished.
struct Flight {
    slot: Option<SendSlot>,
    signaled: bool,
}

/// The memory of a queue pair that was destroyed.
#[derive(Default)]
pub struct Remains {
    /// The slots that it received into.
    pub share: Option<SpentShare>,
    /// The slots of what it did not finish to send.
    pub slots: Vec<SendSlot>,
}

// SAFETY: libibverbs is thread-safe, and the pointer stays valid until drop.
unsafe impl Send for Qp {}
// SAFETY: as above.
unsafe impl Sync for Qp {}

impl Qp {
    /// A queue pair with room for `depth` unfinished sends and `receives` slots, which copies messages up to
    /// `inline` bytes if the device can. What it has sent is reported under the number `user`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(queues: &Queues, user: u16, depth: u32, receives: u32, inline: usize) -> io::Result<Qp> {
        let pd = &queues.pd;
        let mut error = io::Error::from(io::ErrorKind::InvalidInput);
        // A device that cannot copy that much says EINVAL.
        for inline in [inline, inline / 4, 0] {
            let mut attr = QpInitAttr {
                qp_context: std::ptr::null_mut(),
                send_cq: queues.send.cq().raw(),
                recv_cq: queues.receive.cq().raw(),
                srq: std::ptr::null_mut(),
                cap: QpCap {
                    max_send_wr: depth,
                    max_recv_wr: receives,
                    max_send_sge: 1,
                    max_recv_sge: 1,
                    max_inline_data: inline as u32,
                },
                qp_type: QPT_RC,
                sq_sig_all: 0,
            };
            // SAFETY: the domain and the queues live as long as the queue pair, which keeps them.
            let raw = unsafe { (pd.context().library().create_qp)(pd.raw(), &mut attr) };
            if !raw.is_null() {
                return Ok(Qp {
                    raw,
                    // The library may have granted more; that much was asked for.
                    max_inline: inline.min(attr.cap.max_inline_data as usize),
                    id: MADE.fetch_add(1, Relaxed),
                    user,
                    in_flight: VecDeque::with_capacity(depth as usize),
                    share: None,
                    queues: queues.clone(),
                });
            }
            error = io::Error::last_os_error();
        }
        Err(error)
    }

    /// Its number at the adapter.
    pub fn number(&self) -> u32 {
        // SAFETY: valid until drop, and set once.
        unsafe { (*self.raw).qp_num }
    }

    /// Bytes of the longest message that the call itself copies.
    pub fn max_inline(&self) -> usize {
        self.max_inline
    }

    fn modify(&self, mut attr: QpAttr, mask: i32) -> io::Result<()> {
        // SAFETY: the queue pair lives, and the structure is the library's.
        check(unsafe { (self.library().modify_qp)(self.raw, &mut attr, mask as c_int) })
    }

    /// Binds it to a port and gives it the slots of `share`, which is one of its [`Queues`].
    ///
    /// # Errors
    /// The step that failed, and what the kernel says of it. The share is the queue pair's all the same.
    pub fn bind(&mut self, port: u8, share: Share) -> Result<(), String> {
        assert!(share.is_of(&self.queues.receive), "a share of its own queue");
        assert!(self.share.is_none(), "it is bound once");
        let slots: Vec<u16> = share.slots().collect();
        self.share = Some(share);
        let init = QpAttr { qp_state: state::INIT, port_num: port, qp_access_flags: 0, ..QpAttr::default() };
        self.modify(init, mask::STATE | mask::PKEY_INDEX | mask::PORT | mask::ACCESS_FLAGS)
            .map_err(|error| format!("a queue pair cannot use port {port} ({error})"))?;
        for some in slots.chunks(BATCH) {
            // SAFETY: all slots of its share, each once: nobody else has them.
            unsafe { self.post_receives(some) }
                .map_err(|error| format!("a queue pair takes no slot ({error})"))?;
        }
        Ok(())
    }

    /// Takes the slots back whose messages were taken from `queue`.
    ///
    /// # Errors
    /// What the device says; the queue pair does not get these slots any more.
    pub fn refill(&self, queue: &mut ReceiveQueue) -> io::Result<()> {
        let Some(share) = &self.share else { return Ok(()) };
        let (slots, count) = queue.untake(share);
        // SAFETY: slots of its share that the device is done with, each once: they are off the queue's list.
        unsafe { self.post_receives(&slots[..count]) }
    }

    /// Gives it slots to receive into, at most [`BATCH`].
    ///
    /// # Errors
    /// What the device says; none of the slots counts as given then.
    ///
    /// # Safety
    /// The slots are of its share, and no work request has them.
    pub(super) unsafe fn post_receives(&self, slots: &[u16]) -> io::Result<()> {
        assert!(slots.len() <= BATCH, "at most {BATCH} slots at once");
        let Some(share) = &self.share else { return Ok(()) };
        let mut sges = [Sge::default(); BATCH];
        let mut wrs = [const {
            RecvWr { wr_id: 0, next: std::ptr::null_mut(), sg_list: std::ptr::null_mut(), num_sge: 1 }
        }; BATCH];
        let mut next: *mut RecvWr = std::ptr::null_mut();
        for ((slot, sge), wr) in slots.iter().zip(&mut sges).zip(&mut wrs).rev() {
            (wr.wr_id, *sge) = share.work(*slot);
            (wr.sg_list, wr.next) = (sge, next);
            next = wr;
        }
        if next.is_null() {
            return Ok(());
        }
        let mut bad = std::ptr::null_mut();
        // SAFETY: a chain of valid requests, which the call copies; the caller's promise for the memory,
        // which stays as long as this has its share.
        check(unsafe { ((*(*self.raw).context).post_recv)(self.raw, next, &mut bad) })
    }

    /// Connects it, bound as it is, to the peer's queue pair; both directions work afterwards. Blocks for a
    /// second where RoCE does not find the peer.
    ///
    /// # Errors
    /// The step that failed, and what the kernel says of it.
    pub fn connect(&self, route: &Route) -> Result<(), String> {
        let (dgid, sgid_index) = route.gid.unwrap_or_default();
        let ah_attr = AhAttr {
            dgid,
            sgid_index,
            hop_limit: 64,
            dlid: route.lid,
            sl: route.service_level,
            is_global: u8::from(route.gid.is_some()),
            port_num: route.port,
            ..AhAttr::default()
        };
        let receive = QpAttr {
            qp_state: state::RTR,
            path_mtu: route.mtu,
            dest_qp_num: route.qpn,
            rq_psn: route.receive_psn,
            max_dest_rd_atomic: 0,
            min_rnr_timer: RNR_TIMER,
            ah_attr,
            ..QpAttr::default()
        };
        let receive_mask = mask::STATE
            | mask::AV
            | mask::PATH_MTU
            | mask::DEST_QPN
            | mask::RQ_PSN
            | mask::MAX_DEST_RD_ATOMIC
            | mask::MIN_RNR_TIMER;
        self.modify(receive, receive_mask)
            .map_err(|error| format!("a queue pair finds no route to the peer ({error})"))?;
        let send = QpAttr {
            qp_state: state::RTS,
            sq_psn: route.send_psn,
            timeout: ACK_TIMEOUT,
            retry_cnt: route.retries,
            rnr_retry: RNR_RETRIES,
            max_rd_atomic: 0,
            ..QpAttr::default()
        };
        let send_mask = mask::STATE
            | mask::SQ_PSN
            | mask::TIMEOUT
            | mask::RETRY_CNT
            | mask::RNR_RETRY
            | mask::MAX_QP_RD_ATOMIC;
        self.modify(send, send_mask).map_err(|error| format!("a queue pair cannot send ({error})"))
    }

    /// Ends the connection: what is unfinished fails.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn fail(&self) -> io::Result<()> {
        self.modify(QpAttr { qp_state: state::ERR, ..QpAttr::default() }, mask::STATE)
    }

    /// Sends a message; its slot, if it has one, stays here until it is sent.
    ///
    /// # Errors
    /// What the device says; `ENOMEM` when there is no room. The connection is of no use any more then.
    pub fn post(&mut self, message: Message<'_>) -> io::Result<()> {
        let (mut sge, inline, slot) = match message.data {
            Data::Inline(bytes) => {
                assert!(bytes.len() <= self.max_inline, "a message that fits inline");
                (Sge { addr: bytes.as_ptr() as u64, length: bytes.len() as u32, lkey: 0 }, SEND_INLINE, None)
            }
            Data::Slot(slot) => (slot.sge(), 0, Some(slot)),
        };
        let mut wr = SendWr {
            wr_id: work_id(self.id, self.user),
            next: std::ptr::null_mut(),
            sg_list: &mut sge,
            num_sge: c_int::from(sge.length > 0),
            opcode: WR_SEND_WITH_IMM,
            send_flags: inline | if message.signaled { SEND_SIGNALED } else { 0 },
            imm_data: message.immediate.to_be(),
            _rest: [0; 11],
        };
        self.in_flight.push_back(Flight { slot, signaled: message.signaled });
        let mut bad = std::ptr::null_mut();
        // SAFETY: one valid request, which the call copies with its inline data; a slot is kept until it was
        // sent.
        check(unsafe { ((*(*self.raw).context).post_send)(self.raw, &mut wr, &mut bad) })
    }

    /// How many sends were posted and not seen to be finished.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether a send was one of this queue pair's, and not of another one that had the same user.
    pub fn has_sent(&self, sent: &Sent) -> bool {
        sent.pair() == self.id
    }

    /// Takes the news that a send is finished; the slots of what is sent by now go to `free`.
    pub fn finish(&mut self, sent: Sent, free: &mut Vec<SendSlot>) {
        if !self.has_sent(&sent) || !sent.is_success() {
            return;
        }
        // A queue pair finishes its sends in order.
        while let Some(flight) = self.in_flight.pop_front() {
            free.extend(flight.slot);
            if flight.signaled {
                break;
            }
        }
    }

    /// Destroys it; its memory can be used again. If it cannot be destroyed, its memory stays as it is for
    /// good.
    pub fn destroy(mut self) -> Remains {
        self.end()
    }

    fn end(&mut self) -> Remains {
        let (share, in_flight) = (self.share.take(), std::mem::take(&mut self.in_flight));
        // SAFETY: once, because of null; events about it were acknowledged when they were taken.
        let code = unsafe { (self.library().destroy_qp)(self.raw) };
        self.raw = std::ptr::null_mut();
        if code != 0 {
            tracing::warn!(code, "an RDMA queue pair could not be destroyed");
            // The device may still use its memory and its queues.
            std::mem::forget((share, in_flight, self.queues.clone()));
            return Remains::default();
        }
        let slots = in_flight.into_iter().filter_map(|flight| flight.slot).collect();
        Remains { share: share.map(Share::spend), slots }
    }

    fn library(&self) -> &'static Library {
        self.queues.pd.context().library()
    }
}

impl Drop for Qp {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            self.end();
        }
    }
}
