//! Asynchronous events of the device: a port that went down, a device that is gone.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::sender::Sender;
use super::verbs::context::SharedContext;
use super::verbs::ffi::event;
use crate::FabricError;

/// How long a port may be down before its peers are lost. A shorter interruption is bridged by the adapters.
const PORT_DOWN: Duration = Duration::from_secs(2);

/// The device's asynchronous events, which a thread of its own listens to until this is dropped.
pub(super) struct AsyncEvents {
    context: SharedContext,
    port: u8,
    senders: OnceLock<Vec<Weak<Mutex<Sender>>>>,
    /// What is wrong with this side, as a sentence without its point.
    trouble: Mutex<Option<String>>,
    stop: Arc<EventFd>,
}

impl AsyncEvents {
    pub(super) fn new(context: SharedContext, port: u8) -> Result<Arc<AsyncEvents>, FabricError> {
        let stop = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|error| FabricError::Io { what: "creating an eventfd", source: error.into() })?;
        let (senders, trouble) = (OnceLock::new(), Mutex::new(None));
        Ok(Arc::new(AsyncEvents { context, port, senders, trouble, stop: Arc::new(stop) }))
    }

    /// Begins to listen for the lanes of these senders.
    pub(super) fn start(
        self: &Arc<AsyncEvents>,
        senders: Vec<Weak<Mutex<Sender>>>,
    ) -> Result<(), FabricError> {
        // Called once.
        let _ = self.senders.set(senders);
        // The thread holds the device open, but not the lanes, which hold this.
        let (this, context, stop) = (Arc::downgrade(self), self.context.clone(), self.stop.clone());
        std::thread::Builder::new()
            .name("rdma events".into())
            .spawn(move || listen(&this, &context, &stop))
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
        for sender in self.senders.get().into_iter().flatten().filter_map(Weak::upgrade) {
            base::lock(&sender).lose_all(why);
        }
    }
}

impl Drop for AsyncEvents {
    fn drop(&mut self) {
        // Fails only when the counter is full, and then the thread ends as well.
        let _ = self.stop.write(1);
    }
}

fn listen(events: &Weak<AsyncEvents>, context: &SharedContext, stop: &EventFd) {
    let mut down_since: Option<Instant> = None;
    loop {
        let left = down_since.map(|since| (since + PORT_DOWN).saturating_duration_since(Instant::now()));
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = [
            PollFd::new(context.async_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        let polled = poll(&mut fds, timeout);
        let Some(events) = events.upgrade() else { return };
        if fds[1].any() == Some(true) {
            return;
        }
        match polled {
            Ok(0) if down_since.take().is_some() => {
                events.lose_all(&format!("this node's RDMA port {} went down", events.name()));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                return events.lose_all(&format!("this node's RDMA events cannot be read ({error})"));
            }
        }
        loop {
            match context.async_event() {
                Ok(None) => break,
                Ok(Some((event::PORT_ERR, port))) if port == events.port => {
                    tracing::warn!("RDMA port {} went down", events.name());
                    events.note(Some(format!("this node's RDMA port {} is down", events.name())));
                    down_since = Some(Instant::now());
                }
                Ok(Some((event::PORT_ACTIVE, port))) if port == events.port => {
                    tracing::info!("RDMA port {} is up", events.name());
                    events.note(None);
                    down_since = None;
                }
                Ok(Some((kind @ (event::DEVICE_FATAL | event::CQ_ERR), _))) => {
                    let what = context.library().event(kind);
                    events.lose_all(&format!("this node's RDMA device {} failed ({what})", context.name()));
                }
                Ok(Some((kind, _))) => tracing::debug!("RDMA event: {}", context.library().event(kind)),
                Err(error) => {
                    let why = format!("this node's RDMA device {} is gone ({error})", context.name());
                    return events.lose_all(&why);
                }
            }
        }
    }
}
