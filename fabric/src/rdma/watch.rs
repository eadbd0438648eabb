//! What the device says of itself: a port that went down, a device that is gone.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::lane::Lane;
use super::verbs::context::SharedContext;
use super::verbs::ffi::event;
use crate::FabricError;

/// How long a port may be down before its peers are lost. A shorter interruption is bridged by the adapters.
const PORT_DOWN: Duration = Duration::from_secs(2);

/// Listens to the device's asynchronous events on a thread of its own, until it is dropped.
pub(super) struct Watch {
    context: SharedContext,
    port: u8,
    lanes: OnceLock<Vec<Weak<Lane>>>,
    /// What is wrong with this side, as a sentence without its point.
    trouble: Mutex<Option<String>>,
    stop: Arc<EventFd>,
}

impl Watch {
    pub(super) fn new(context: SharedContext, port: u8) -> Result<Arc<Watch>, FabricError> {
        let stop = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|error| FabricError::Io { what: "creating an eventfd", source: error.into() })?;
        let (lanes, trouble) = (OnceLock::new(), Mutex::new(None));
        Ok(Arc::new(Watch { context, port, lanes, trouble, stop: Arc::new(stop) }))
    }

    /// Begins to listen for the sake of `lanes`.
    pub(super) fn start(self: &Arc<Watch>, lanes: &[Arc<Lane>]) -> Result<(), FabricError> {
        // Called once.
        let _ = self.lanes.set(lanes.iter().map(Arc::downgrade).collect());
        // The thread holds the device open, but not the lanes, which hold this.
        let (watch, context, stop) = (Arc::downgrade(self), self.context.clone(), self.stop.clone());
        std::thread::Builder::new()
            .name("rdma events".into())
            .spawn(move || listen(&watch, &context, &stop))
            .map(drop)
            .map_err(|source| FabricError::Io { what: "starting the thread for RDMA events", source })
    }

    fn name(&self) -> String {
        format!("{}/{}", self.context.name(), self.port)
    }

    fn note(&self, trouble: Option<String>) {
        *base::lock(&self.trouble) = trouble;
    }

    /// Adds to a loss what is wrong with this side.
    pub(super) fn explain(&self, error: FabricError) -> FabricError {
        let trouble = base::lock(&self.trouble);
        match (error, &*trouble) {
            (FabricError::PeerLost { peer, why }, Some(trouble)) if !why.contains(trouble.as_str()) => {
                FabricError::PeerLost { peer, why: format!("{why}; {trouble}") }
            }
            (error, _) => error,
        }
    }

    fn lose_all(&self, why: &str) {
        tracing::error!("{why}: all peers are lost");
        self.note(Some(why.to_owned()));
        for lane in self.lanes.get().into_iter().flatten().filter_map(Weak::upgrade) {
            lane.lock().lose_all(why);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Fails only when the counter is full, and then the thread ends as well.
        let _ = self.stop.write(1);
    }
}

fn listen(watch: &Weak<Watch>, context: &SharedContext, stop: &EventFd) {
    let mut down_since: Option<Instant> = None;
    loop {
        let left = down_since.map(|since| (since + PORT_DOWN).saturating_duration_since(Instant::now()));
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        // SAFETY: the device is open as long as `context`.
        let events = unsafe { BorrowedFd::borrow_raw(context.async_fd()) };
        let mut fds = [PollFd::new(events, PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        let polled = poll(&mut fds, timeout);
        let Some(watch) = watch.upgrade() else { return };
        if fds[1].any() == Some(true) {
            return;
        }
        match polled {
            Ok(0) if down_since.take().is_some() => {
                watch.lose_all(&format!("this node's RDMA port {} went down", watch.name()));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                return watch.lose_all(&format!("this node's RDMA events cannot be read ({error})"));
            }
        }
        loop {
            match context.async_event() {
                Ok(None) => break,
                Ok(Some((event::PORT_ERR, port))) if port == watch.port => {
                    tracing::warn!("RDMA port {} went down", watch.name());
                    watch.note(Some(format!("this node's RDMA port {} is down", watch.name())));
                    down_since = Some(Instant::now());
                }
                Ok(Some((event::PORT_ACTIVE, port))) if port == watch.port => {
                    tracing::info!("RDMA port {} is up", watch.name());
                    watch.note(None);
                    down_since = None;
                }
                Ok(Some((kind @ (event::DEVICE_FATAL | event::CQ_ERR), _))) => {
                    let what = context.library().event(kind);
                    watch.lose_all(&format!("this node's RDMA device {} failed ({what})", context.name()));
                }
                Ok(Some((kind, _))) => tracing::debug!("RDMA event: {}", context.library().event(kind)),
                Err(error) => {
                    let why = format!("this node's RDMA device {} is gone ({error})", context.name());
                    return watch.lose_all(&why);
                }
            }
        }
    }
}
