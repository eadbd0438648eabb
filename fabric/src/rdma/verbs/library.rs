//! `libibverbs.so.1`, opened at run time.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use nix::libc;

use super::ffi::{
    AsyncEvent, CompChannel, Context, Cq, Device, DeviceAttr, Mr, Pd, PortAttr, Qp, QpAttr, QpInitAttr,
};

const NAME: &CStr = c"libibverbs.so.1";

macro_rules! library {
    ($($name:ident($($type:ty),*) $(-> $result:ty)?;)+) => {
        /// The library's functions, under their names in the manual without `ibv_`.
        pub struct Library {
            $(pub $name: unsafe extern "C" fn($($type),*) $(-> $result)?,)+
        }

        impl Library {
            fn load(handle: *mut c_void) -> Result<Library, String> {
                Ok(Library {
                    // SAFETY: the symbol of that name is a function of that type: rdma-core keeps the ABI of
                    // its exported functions (the types are those of its header).
                    $($name: unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) $(-> $result)?>(
                            symbol(handle, concat!("ibv_", stringify!($name), "\0"))?,
                        )
                    },)+
                })
            }
        }
    };
}

library! {
    get_device_list(*mut c_int) -> *mut *mut Device;
    free_device_list(*mut *mut Device);
    get_device_name(*mut Device) -> *const c_char;
    open_device(*mut Device) -> *mut Context;
    close_device(*mut Context) -> c_int;
    query_device(*mut Context, *mut DeviceAttr) -> c_int;
    query_port(*mut Context, u8, *mut PortAttr) -> c_int;
    get_async_event(*mut Context, *mut AsyncEvent) -> c_int;
    ack_async_event(*mut AsyncEvent);
    event_type_str(u32) -> *const c_char;
    alloc_pd(*mut Context) -> *mut Pd;
    dealloc_pd(*mut Pd) -> c_int;
    reg_mr(*mut Pd, *mut c_void, usize, c_int) -> *mut Mr;
    dereg_mr(*mut Mr) -> c_int;
    create_comp_channel(*mut Context) -> *mut CompChannel;
    destroy_comp_channel(*mut CompChannel) -> c_int;
    create_cq(*mut Context, c_int, *mut c_void, *mut CompChannel, c_int) -> *mut Cq;
    destroy_cq(*mut Cq) -> c_int;
    get_cq_event(*mut CompChannel, *mut *mut Cq, *mut *mut c_void) -> c_int;
    ack_cq_events(*mut Cq, u32);
    create_qp(*mut Pd, *mut QpInitAttr) -> *mut Qp;
    modify_qp(*mut Qp, *mut QpAttr, c_int) -> c_int;
    destroy_qp(*mut Qp) -> c_int;
    wc_status_str(u32) -> *const c_char;
}

/// The library, opened at the first call and never closed.
///
/// # Errors
/// Why it cannot be used, as the end of a sentence.
pub fn library() -> Result<&'static Library, String> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    LIBRARY.get_or_init(open).as_ref().map_err(Clone::clone)
}

fn open() -> Result<Library, String> {
    // SAFETY: the name is a C string; the library's initialisers are those of a system library that programs
    // usually link to.
    let handle = unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() {
        return Err(format!(
            "libibverbs.so.1 cannot be opened ({}): install rdma-core (Debian: rdma-core and ibverbs-providers)",
            last_error()
        ));
    }
    Library::load(handle)
}

/// The address of a function; `name` ends in a zero byte.
fn symbol(handle: *mut c_void, name: &str) -> Result<*mut c_void, String> {
    // SAFETY: the handle came from dlopen and is never closed; the name ends in a zero byte.
    let address = unsafe { libc::dlsym(handle, name.as_ptr().cast()) };
    if address.is_null() {
        return Err(format!(
            "libibverbs.so.1 has no {}: install a newer rdma-core",
            name.trim_end_matches('\0')
        ));
    }
    Ok(address)
}

fn last_error() -> String {
    // SAFETY: returns null or a C string that is valid until this thread's next call of its family.
    let text = unsafe { libc::dlerror() };
    // SAFETY: as above; it is copied at once.
    if text.is_null() { "no reason given".into() } else { unsafe { text_of(text) } }
}

/// The text behind a pointer of the library's; empty for null.
///
/// # Safety
/// Null, or a C string that lives during the call.
pub unsafe fn text_of(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

impl Library {
    /// What a completion's status means.
    pub fn status(&self, status: u32) -> String {
        // SAFETY: takes any number and returns a constant string.
        unsafe { text_of((self.wc_status_str)(status)) }
    }

    /// What an asynchronous event's type means.
    pub fn event(&self, event: u32) -> String {
        // SAFETY: takes any number and returns a constant string.
        unsafe { text_of((self.event_type_str)(event)) }
    }
}
