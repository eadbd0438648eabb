//! Structures and constants of `<infiniband/verbs.h>` (rdma-core, ABI 1.1 and later, x86-64).
//!
//! Only what is used has names; the rest is padding. The layouts have been the same since ABI 1.1 of 2007 and
//! are part of the library's promise; the asserts below hold them against rdma-core 44.

use std::mem::{offset_of, size_of};

use nix::libc::{c_int, c_uint, c_void};

/// A device that can be opened; the library's own.
#[repr(C)]
pub struct Device {
    _opaque: [u8; 0],
}

/// A protection domain; the library's own.
#[repr(C)]
pub struct Pd {
    _opaque: [u8; 0],
}

/// `struct ibv_context`, with the four calls that the header inlines.
#[repr(C)]
pub struct Context {
    _device: *mut Device,
    _ops: [*mut c_void; 11],
    pub poll_cq: unsafe extern "C" fn(*mut Cq, c_int, *mut Wc) -> c_int,
    pub req_notify_cq: unsafe extern "C" fn(*mut Cq, c_int) -> c_int,
    _ops2: [*mut c_void; 12],
    pub post_send: unsafe extern "C" fn(*mut Qp, *mut SendWr, *mut *mut SendWr) -> c_int,
    pub post_recv: unsafe extern "C" fn(*mut Qp, *mut RecvWr, *mut *mut RecvWr) -> c_int,
    _ops3: [*mut c_void; 5],
    _cmd_fd: c_int,
    pub async_fd: c_int,
    _rest: [u64; 7],
}

/// `struct ibv_comp_channel`.
#[repr(C)]
pub struct CompChannel {
    _context: *mut Context,
    pub fd: c_int,
    _refcnt: c_int,
}

/// `struct ibv_cq`.
#[repr(C)]
pub struct Cq {
    pub context: *mut Context,
    _rest: [u64; 15],
}

/// `struct ibv_qp`.
#[repr(C)]
pub struct Qp {
    pub context: *mut Context,
    _pointers: [*mut c_void; 5],
    _handle: u32,
    pub qp_num: u32,
    _rest: [u64; 13],
}

/// `struct ibv_mr`.
#[repr(C)]
pub struct Mr {
    _context: *mut Context,
    _pd: *mut Pd,
    _addr: *mut c_void,
    _length: usize,
    _handle: u32,
    pub lkey: u32,
    _rkey: u32,
}

/// `struct ibv_sge`.
#[repr(C)]
#[derive(Copy, Clone, Default)]
pub struct Sge {
    pub addr: u64,
    pub length: u32,
    pub lkey: u32,
}

/// `struct ibv_send_wr`.
#[repr(C)]
pub struct SendWr {
    pub wr_id: u64,
    pub next: *mut SendWr,
    pub sg_list: *mut Sge,
    pub num_sge: c_int,
    pub opcode: u32,
    pub send_flags: c_uint,
    /// In network byte order.
    pub imm_data: u32,
    pub _rest: [u64; 11],
}

/// `struct ibv_recv_wr`.
#[repr(C)]
pub struct RecvWr {
    pub wr_id: u64,
    pub next: *mut RecvWr,
    pub sg_list: *mut Sge,
    pub num_sge: c_int,
}

/// `struct ibv_wc`.
#[repr(C)]
#[derive(Copy, Clone, Default)]
pub struct Wc {
    pub wr_id: u64,
    pub status: u32,
    pub opcode: u32,
    _vendor_err: u32,
    pub byte_len: u32,
    /// In network byte order.
    pub imm_data: u32,
    pub qp_num: u32,
    _src_qp: u32,
    pub wc_flags: c_uint,
    _pkey_index: u16,
    _slid: u16,
    _sl: u8,
    _dlid_path_bits: u8,
}

/// `struct ibv_qp_cap`.
#[repr(C)]
#[derive(Copy, Clone, Default)]
pub struct QpCap {
    pub max_send_wr: u32,
    pub max_recv_wr: u32,
    pub max_send_sge: u32,
    pub max_recv_sge: u32,
    pub max_inline_data: u32,
}

/// `struct ibv_qp_init_attr`.
#[repr(C)]
pub struct QpInitAttr {
    pub qp_context: *mut c_void,
    pub send_cq: *mut Cq,
    pub recv_cq: *mut Cq,
    /// A shared receive queue; null.
    pub srq: *mut c_void,
    pub cap: QpCap,
    pub qp_type: u32,
    pub sq_sig_all: c_int,
}

/// `struct ibv_ah_attr` with its `struct ibv_global_route`.
#[repr(C)]
#[derive(Copy, Clone, Default)]
pub struct AhAttr {
    pub dgid: [u8; 16],
    /// Makes the route's alignment that of the union in the header.
    pub _align: [u64; 0],
    pub flow_label: u32,
    pub sgid_index: u8,
    pub hop_limit: u8,
    pub traffic_class: u8,
    pub dlid: u16,
    pub sl: u8,
    pub src_path_bits: u8,
    pub static_rate: u8,
    pub is_global: u8,
    pub port_num: u8,
}

/// `struct ibv_qp_attr`.
#[repr(C)]
#[derive(Copy, Clone, Default)]
pub struct QpAttr {
    pub qp_state: u32,
    pub _cur_qp_state: u32,
    pub path_mtu: u32,
    pub _path_mig_state: u32,
    pub _qkey: u32,
    pub rq_psn: u32,
    pub sq_psn: u32,
    pub dest_qp_num: u32,
    pub qp_access_flags: c_uint,
    pub _cap: QpCap,
    pub ah_attr: AhAttr,
    pub _alt_ah_attr: AhAttr,
    pub pkey_index: u16,
    pub _alt_pkey_index: u16,
    pub _en_sqd_async_notify: u8,
    pub _sq_draining: u8,
    pub max_rd_atomic: u8,
    pub max_dest_rd_atomic: u8,
    pub min_rnr_timer: u8,
    pub port_num: u8,
    pub timeout: u8,
    pub retry_cnt: u8,
    pub rnr_retry: u8,
    pub _alt_port_num: u8,
    pub _alt_timeout: u8,
    pub _rate_limit: u32,
}

/// `struct ibv_port_attr`. The exported `ibv_query_port` fills an older, shorter one: zero it first.
#[repr(C)]
#[derive(Copy, Clone, Default)]
pub struct PortAttr {
    pub state: u32,
    _max_mtu: u32,
    pub active_mtu: u32,
    _gid_tbl_len: c_int,
    _words: [u32; 4],
    _pkey_tbl_len: u16,
    pub lid: u16,
    _sm_lid: u16,
    _bytes: [u8; 8],
    pub link_layer: u8,
    _flags: u8,
    _port_cap_flags2: u16,
}

/// `struct ibv_device_attr`.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct DeviceAttr {
    _before: [u32; 27],
    pub max_qp: c_int,
    pub max_qp_wr: c_int,
    _more: [c_int; 3],
    pub max_cq: c_int,
    pub max_cqe: c_int,
    pub max_mr: c_int,
    _others: [c_int; 21],
    _max_pkeys: u16,
    _local_ca_ack_delay: u8,
    pub phys_port_cnt: u8,
    _align: [u64; 0],
}

/// `struct ibv_async_event`.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct AsyncEvent {
    /// A port's number or the address of the object concerned.
    pub element: u64,
    pub event_type: u32,
}

macro_rules! layout {
    ($($type:ident: $size:literal $(, $field:ident @ $offset:literal)*;)+) => {
        $(const _: () = assert!(size_of::<$type>() == $size);
        $(const _: () = assert!(offset_of!($type, $field) == $offset);)*)+
    };
}

layout! {
    Context: 328, poll_cq @ 96, req_notify_cq @ 104, post_send @ 208, post_recv @ 216, async_fd @ 268;
    CompChannel: 16, fd @ 8;
    Cq: 128;
    Qp: 160, qp_num @ 52;
    Mr: 48, lkey @ 36;
    Sge: 16;
    SendWr: 128, sg_list @ 16, opcode @ 28, send_flags @ 32, imm_data @ 36, _rest @ 40;
    RecvWr: 32;
    Wc: 48, status @ 8, byte_len @ 20, imm_data @ 24, qp_num @ 28, wc_flags @ 36;
    QpCap: 20;
    QpInitAttr: 64, cap @ 32, qp_type @ 52, sq_sig_all @ 56;
    AhAttr: 32, sgid_index @ 20, hop_limit @ 21, dlid @ 24, sl @ 26, is_global @ 29, port_num @ 30;
    QpAttr: 144, path_mtu @ 8, rq_psn @ 20, dest_qp_num @ 28, qp_access_flags @ 32, ah_attr @ 56,
        _alt_ah_attr @ 88, pkey_index @ 120, max_rd_atomic @ 126, min_rnr_timer @ 128, rnr_retry @ 132;
    PortAttr: 52, state @ 0, active_mtu @ 8, lid @ 34, link_layer @ 46;
    DeviceAttr: 232, max_qp @ 108, max_qp_wr @ 112, max_cq @ 128, max_cqe @ 132, phys_port_cnt @ 227;
    AsyncEvent: 16, event_type @ 8;
}

/// `IBV_WR_SEND_WITH_IMM`.
pub const WR_SEND_WITH_IMM: u32 = 3;
/// `IBV_SEND_SIGNALED`.
pub const SEND_SIGNALED: c_uint = 1 << 1;
/// `IBV_SEND_INLINE`.
pub const SEND_INLINE: c_uint = 1 << 3;
/// `IBV_WC_WITH_IMM`.
pub const WC_WITH_IMM: c_uint = 1 << 1;
/// `IBV_ACCESS_LOCAL_WRITE`.
pub const ACCESS_LOCAL_WRITE: c_int = 1;
/// `IBV_QPT_RC`.
pub const QPT_RC: u32 = 2;
/// `IBV_LINK_LAYER_ETHERNET`.
pub const LINK_LAYER_ETHERNET: u8 = 2;
/// `IBV_PORT_ACTIVE`.
pub const PORT_ACTIVE: u32 = 4;

/// `enum ibv_wc_status`.
pub mod status {
    pub const SUCCESS: u32 = 0;
    pub const LOC_LEN_ERR: u32 = 1;
    pub const WR_FLUSH_ERR: u32 = 5;
    pub const REM_INV_REQ_ERR: u32 = 9;
    pub const RETRY_EXC_ERR: u32 = 12;
    pub const RNR_RETRY_EXC_ERR: u32 = 13;
}

/// `enum ibv_qp_state`.
pub mod state {
    pub const INIT: u32 = 1;
    pub const RTR: u32 = 2;
    pub const RTS: u32 = 3;
    pub const ERR: u32 = 6;
}

/// `enum ibv_qp_attr_mask`.
pub mod mask {
    pub const STATE: i32 = 1 << 0;
    pub const ACCESS_FLAGS: i32 = 1 << 3;
    pub const PKEY_INDEX: i32 = 1 << 4;
    pub const PORT: i32 = 1 << 5;
    pub const AV: i32 = 1 << 7;
    pub const PATH_MTU: i32 = 1 << 8;
    pub const TIMEOUT: i32 = 1 << 9;
    pub const RETRY_CNT: i32 = 1 << 10;
    pub const RNR_RETRY: i32 = 1 << 11;
    pub const RQ_PSN: i32 = 1 << 12;
    pub const MAX_QP_RD_ATOMIC: i32 = 1 << 13;
    pub const MIN_RNR_TIMER: i32 = 1 << 15;
    pub const SQ_PSN: i32 = 1 << 16;
    pub const MAX_DEST_RD_ATOMIC: i32 = 1 << 17;
    pub const DEST_QPN: i32 = 1 << 20;
}

/// `enum ibv_event_type`.
pub mod event {
    pub const CQ_ERR: u32 = 0;
    pub const DEVICE_FATAL: u32 = 8;
    pub const PORT_ACTIVE: u32 = 9;
    pub const PORT_ERR: u32 = 10;
}
