//! Reliable-connected queue pairs.

use std::ffi::c_int;
use std::io;
use std::sync::Arc;

use super::check;
use super::completion::Cq;
use super::ffi::{
    self, AhAttr, QPT_RC, QpAttr, QpCap, QpInitAttr, RecvWr, SEND_INLINE, SEND_SIGNALED, SendWr, Sge,
    WR_SEND_WITH_IMM, mask, state,
};
use super::memory::{Pd, Slots};

/// Receive requests posted with one call.
pub const MOST_RECEIVES: usize = 32;

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

/// How long the peer's adapter may take to acknowledge, as the exponent of 4.096 us: 134 ms (IBA vol. 1, 9.7.6.1.3;
/// adapters may take up to four times that).
const ACK_TIMEOUT: u8 = 15;
/// Transmissions beyond the first before the connection fails: a second, and four where adapters take so long. Not 7,
/// the most that there is: to soft-RoCE (Linux, rxe_comp.c) that means without end.
pub const RETRIES: u8 = 6;
/// The same where there is another rail to go on over: half of that.
pub const RAIL_RETRIES: u8 = 3;
/// Times that the peer may be without a receive slot, which credits rule out.
const RNR_RETRIES: u8 = 6;
/// The pause that a sender without receive slot is asked for: code 12 is 0.64 ms.
const RNR_TIMER: u8 = 12;

/// A message to send.
pub struct Message<'a> {
    /// What its completion says; failed ones come back even if `signaled` is false.
    pub id: u64,
    /// Its four bytes beside the data.
    pub immediate: u32,
    /// Its data.
    pub data: Data<'a>,
    /// Whether a completion is wanted.
    pub signaled: bool,
}

/// Where a message's data is.
pub enum Data<'a> {
    /// Copied by the call; at most [`Qp::max_inline`] bytes.
    Inline(&'a [u8]),
    /// In a slot.
    Slot(Sge),
}

/// A reliable-connected queue pair.
pub struct Qp {
    raw: *mut ffi::Qp,
    max_inline: usize,
    pd: Arc<Pd>,
    _queues: (Arc<Cq>, Arc<Cq>),
}

// SAFETY: libibverbs is thread-safe, and the pointer stays valid until drop.
unsafe impl Send for Qp {}
// SAFETY: as above.
unsafe impl Sync for Qp {}

impl Qp {
    /// A queue pair with room for `depth` unfinished sends and `receives` slots, which copies messages up to `inline`
    /// bytes if the device can.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(
        pd: &Arc<Pd>,
        send: &Arc<Cq>,
        receive: &Arc<Cq>,
        depth: u32,
        receives: u32,
        inline: usize,
    ) -> io::Result<Qp> {
        let mut error = io::Error::from(io::ErrorKind::InvalidInput);
        // A device that cannot copy that much says EINVAL.
        for inline in [inline, inline / 4, 0] {
            let mut attr = QpInitAttr {
                qp_context: std::ptr::null_mut(),
                send_cq: send.raw(),
                recv_cq: receive.raw(),
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
                let queues = (send.clone(), receive.clone());
                // The library may have granted more; that much was asked for.
                let max_inline = inline.min(attr.cap.max_inline_data as usize);
                return Ok(Qp { raw, max_inline, pd: pd.clone(), _queues: queues });
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
        check(unsafe { (self.pd.context().library().modify_qp)(self.raw, &mut attr, mask as c_int) })
    }

    /// Binds it to a port: it takes slots from now on.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn bind(&self, port: u8) -> Result<(), String> {
        let init = QpAttr { qp_state: state::INIT, port_num: port, qp_access_flags: 0, ..QpAttr::default() };
        self.modify(init, mask::STATE | mask::PKEY_INDEX | mask::PORT | mask::ACCESS_FLAGS)
            .map_err(|error| format!("a queue pair cannot use port {port} ({error})"))
    }

    /// Gives it slots to receive into, at most [`MOST_RECEIVES`]; a slot's index comes back as its completion's `wr_id`.
    ///
    /// # Errors
    /// What the device says; none of the slots counts as given then.
    ///
    /// # Safety
    /// The slots are the caller's; from now on they are the device's, which is one that `slots` is registered with.
    pub unsafe fn give(&self, slots: &Slots, indexes: &[u16]) -> io::Result<()> {
        assert!(indexes.len() <= MOST_RECEIVES, "at most {MOST_RECEIVES} slots at once");
        let mut sges = [Sge::default(); MOST_RECEIVES];
        let mut wrs = [const {
            RecvWr { wr_id: 0, next: std::ptr::null_mut(), sg_list: std::ptr::null_mut(), num_sge: 1 }
        }; MOST_RECEIVES];
        let mut next: *mut RecvWr = std::ptr::null_mut();
        for ((index, sge), wr) in indexes.iter().zip(&mut sges).zip(&mut wrs).rev() {
            *sge = slots.sge(usize::from(*index), slots.slot());
            (wr.wr_id, wr.sg_list, wr.next) = (u64::from(*index), sge, next);
            next = wr;
        }
        if next.is_null() {
            return Ok(());
        }
        let mut bad = std::ptr::null_mut();
        // SAFETY: a chain of valid requests, which the call copies; the caller's promise for the memory.
        check(unsafe { ((*(*self.raw).context).post_recv)(self.raw, next, &mut bad) })
    }

    /// Connects it, bound as it is, to the peer's queue pair; both directions work afterwards. Blocks for a second where
    /// RoCE does not find the peer.
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

    /// Sends a message.
    ///
    /// # Errors
    /// What the device says; `ENOMEM` when there is no room.
    ///
    /// # Safety
    /// Data in a slot is the caller's and stays unchanged until a completion says that it was sent.
    pub unsafe fn post(&self, message: &Message<'_>) -> io::Result<()> {
        let (mut sge, inline) = match message.data {
            Data::Inline(bytes) => {
                assert!(bytes.len() <= self.max_inline, "a message that fits inline");
                (Sge { addr: bytes.as_ptr() as u64, length: bytes.len() as u32, lkey: 0 }, SEND_INLINE)
            }
            Data::Slot(sge) => (sge, 0),
        };
        let mut wr = SendWr {
            wr_id: message.id,
            next: std::ptr::null_mut(),
            sg_list: &mut sge,
            num_sge: c_int::from(sge.length > 0),
            opcode: WR_SEND_WITH_IMM,
            send_flags: inline | if message.signaled { SEND_SIGNALED } else { 0 },
            imm_data: message.immediate.to_be(),
            _rest: [0; 11],
        };
        let mut bad = std::ptr::null_mut();
        // SAFETY: one valid request, which the call copies with its inline data; the caller's promise for a slot.
        check(unsafe { ((*(*self.raw).context).post_send)(self.raw, &mut wr, &mut bad) })
    }
}

impl Drop for Qp {
    fn drop(&mut self) {
        // SAFETY: once; events about it were acknowledged when they were taken.
        let code = unsafe { (self.pd.context().library().destroy_qp)(self.raw) };
        if code != 0 {
            tracing::warn!(code, "an RDMA queue pair could not be destroyed");
        }
    }
}
