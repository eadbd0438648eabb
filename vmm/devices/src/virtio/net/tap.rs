//! A TAP interface of the host (Documentation/networking/tuntap.rst).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::{HEADER, Port};
use machine::config::devices::{MAX_QUEUE_PAIRS, MAX_TAP_NAME};

/// Why a TAP interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The device file.
    #[error("/dev/net/tun cannot be opened: {0}: load the module tun, or give this user access")]
    Device(io::Error),
    /// The interface.
    #[error(
        "the TAP interface {name} cannot be used: {source}: make it (`ip tuntap add {name} mode tap{multi}`) and let \
         this user have it, or run as root and name one that nothing else uses"
    )]
    Interface {
        /// Its name.
        name: String,
        /// What `ip tuntap` needs to be told for several queues.
        multi: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// An interface, open once for each pair of queues.
pub struct Tap {
    name: [libc::c_char; libc::IFNAMSIZ],
    files: Vec<File>,
}

impl Tap {
    /// Opens the interface `name`, or makes it if there is none and this process may.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &str, pairs: u16) -> Result<Tap, TapError> {
        let pairs = pairs.clamp(1, MAX_QUEUE_PAIRS);
        let multi = if pairs > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let failed = |source| TapError::Interface {
            name: name.into(),
            multi: if pairs > 1 { " multi_queue" } else { "" },
            source,
        };
        let mut tap = Tap { name: [0; libc::IFNAMSIZ], files: Vec::new() };
        if name.is_empty() || name.len() > MAX_TAP_NAME || name.bytes().any(|byte| byte == 0) {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        for (to, from) in tap.name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        for _ in 0..pairs {
            let mut options = OpenOptions::new();
            options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
            let file = options.open("/dev/net/tun").map_err(TapError::Device)?;
            let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi;
            let mut request = tap.request(flags);
            // SAFETY: TUNSETIFF reads and writes one ifreq, which this is.
            check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })
                .map_err(failed)?;
            let header = HEADER as libc::c_int;
            // SAFETY: TUNSETVNETHDRSZ reads one int.
            check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const header) })
                .map_err(failed)?;
            tap.files.push(file);
        }
        Ok(tap)
    }

    fn request(&self, flags: libc::c_int) -> libc::ifreq {
        libc::ifreq {
            ifr_name: self.name,
            ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags as libc::c_short },
        }
    }
}

impl Port for Tap {
    fn file(&self, pair: u16) -> BorrowedFd<'_> {
        // There is one for each pair that the device was made with.
        self.files[usize::from(pair) % self.files.len()].as_fd()
    }

    fn set_offloads(&self, checksum: bool, tcp4: bool, tcp6: bool) -> io::Result<()> {
        let on = |wanted: bool, flag: libc::c_uint| if wanted { flag } else { 0 };
        // Segments need checksums.
        let flags = on(checksum, libc::TUN_F_CSUM)
            | on(checksum && tcp4, libc::TUN_F_TSO4)
            | on(checksum && tcp6, libc::TUN_F_TSO6);
        let flags = libc::c_ulong::from(flags);
        // The setting is the interface's, whichever of its files it is made through.
        // SAFETY: TUNSETOFFLOAD takes a number.
        check(unsafe { libc::ioctl(self.files[0].as_raw_fd(), libc::TUNSETOFFLOAD as _, flags) })
    }

    fn attach(&self, pair: u16, attached: bool) -> io::Result<()> {
        let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let mut request = self.request(flags);
        // SAFETY: TUNSETQUEUE reads one ifreq, which this is.
        match check(unsafe {
            libc::ioctl(self.file(pair).as_raw_fd(), libc::TUNSETQUEUE as _, &raw mut request)
        }) {
            // It is as wanted already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
