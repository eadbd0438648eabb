//! An opened RDMA device, its ports, and its asynchronous events.

use std::ffi::c_int;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::check;
use super::ffi::{self, AsyncEvent, DeviceAttr, PortAttr};
use super::library::{Library, library, text_of};

/// An opened RDMA device. Everything made of it keeps it open.
pub struct Context {
    raw: *mut ffi::Context,
    name: String,
    library: &'static Library,
}

// SAFETY: libibverbs is thread-safe, and the pointer stays valid until drop (verbs(7), "thread safe").
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

fn with_devices<T>(use_them: impl FnOnce(&'static Library, &[*mut ffi::Device]) -> T) -> Result<T, String> {
    let library = library()?;
    let mut count: c_int = 0;
    // SAFETY: writes the count and returns null or an array of that many pointers.
    let list = unsafe { (library.get_device_list)(&mut count) };
    if list.is_null() {
        return Err(match io::Error::last_os_error().raw_os_error() {
            Some(nix::libc::ENOSYS) => {
                "the kernel has no RDMA support loaded: `modprobe ib_uverbs` and your adapter's driver".into()
            }
            _ => format!("its devices cannot be listed ({})", io::Error::last_os_error()),
        });
    }
    // SAFETY: `count` valid pointers until the list is freed below.
    let devices = unsafe { std::slice::from_raw_parts(list, usize::try_from(count).unwrap_or(0)) };
    let result = use_them(library, devices);
    // SAFETY: the list from above, once; opened devices stay valid (ibv_get_device_list(3)).
    unsafe { (library.free_device_list)(list) };
    Ok(result)
}

impl Context {
    /// Opens the device of this name.
    ///
    /// # Errors
    /// Why not, as the end of a sentence.
    pub fn open(name: &str) -> Result<Context, String> {
        with_devices(|library, devices| {
            for device in devices {
                // SAFETY: a device of the list, which is freed later.
                if unsafe { text_of((library.get_device_name)(*device)) } != name {
                    continue;
                }
                // SAFETY: as above.
                let raw = unsafe { (library.open_device)(*device) };
                if raw.is_null() {
                    return Err(format!(
                        "the device {name} cannot be opened ({}): see the rights of /dev/infiniband/uverbs*",
                        io::Error::last_os_error()
                    ));
                }
                let context = Context { raw, name: name.to_owned(), library };
                set_nonblocking(context.async_fd())
                    .map_err(|error| format!("the events of {name} cannot be watched ({error})"))?;
                return Ok(context);
            }
            Err(format!("there is no device {name}: `ibv_devices` lists them"))
        })?
    }

    /// A device that was opened otherwise.
    #[cfg(test)]
    pub(super) fn of(raw: *mut ffi::Context, name: String, library: &'static Library) -> Context {
        Context { raw, name, library }
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn raw(&self) -> *mut ffi::Context {
        self.raw
    }

    /// The library's functions.
    pub fn library(&self) -> &'static Library {
        self.library
    }

    /// The device's limits.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn limits(&self) -> io::Result<DeviceAttr> {
        // SAFETY: plain numbers, for which zero is valid.
        let mut attr: DeviceAttr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open, and the structure has the size that the library fills.
        check(unsafe { (self.library.query_device)(self.raw, &mut attr) })?;
        Ok(attr)
    }

    /// State, MTU, LID and link layer of port `port`, counted from 1.
    ///
    /// # Errors
    /// What the kernel says; `EINVAL` for a port that does not exist.
    pub fn port(&self, port: u8) -> io::Result<PortAttr> {
        let mut attr = PortAttr::default();
        // SAFETY: as in `limits`; the library fills at most the structure's size.
        check(unsafe { (self.library.query_port)(self.raw, port, &mut attr) })?;
        Ok(attr)
    }

    /// The descriptor that is readable while there is an asynchronous event.
    pub fn async_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is open until drop, and so is its descriptor; the field is set once when it is
        // opened.
        unsafe { BorrowedFd::borrow_raw((*self.raw).async_fd) }
    }

    /// The next asynchronous event (its type, and its port if it is about one); `None` when there is none
    /// now.
    ///
    /// # Errors
    /// What the kernel says; `EIO` or the like for a device that was removed.
    pub fn async_event(&self) -> io::Result<Option<(u32, u8)>> {
        let mut event = AsyncEvent { element: 0, event_type: 0 };
        // SAFETY: the context is open, and the structure is the library's.
        match check(unsafe { (self.library.get_async_event)(self.raw, &mut event) }) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(None),
            Err(error) => return Err(error),
        }
        let found = (event.event_type, event.element as u8);
        // SAFETY: acknowledged once, right after it was got; destroying the object concerned waits for this.
        unsafe { (self.library.ack_async_event)(&mut event) };
        Ok(Some(found))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: whatever was made of it held it, and so is gone; closed once.
        if unsafe { (self.library.close_device)(self.raw) } != 0 {
            tracing::warn!(device = self.name, "the RDMA device could not be closed");
        }
    }
}

/// What keeps a device open.
pub type SharedContext = Arc<Context>;

pub(super) fn set_nonblocking(fd: BorrowedFd<'_>) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}
