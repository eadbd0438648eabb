//! A node's vCPUs as its engine sees them: a trait to call them out of their waits and to answer their
//! operations.

use crate::page::Page;

/// The vCPUs of a node, as its engine deals with them. The engine's threads call these, so none may block.
pub trait Vcpus: Send + Sync {
    /// Whether a thread that waits for `page` is a vCPU's that can do without it.
    fn may_ship(&self, thread: u32, page: Page) -> bool;
    /// The page stays where it is: the vCPU is to be called out, and then to use [`super::Engine::operate`], or to
    /// touch the page again. `false` if it cannot be: the page must come.
    fn call_out(&self, thread: u32, page: Page) -> bool;
    /// Whether the vCPU was called out for `page` and has not looked yet.
    fn is_called(&self, thread: u32, page: Page) -> bool;
    /// What became of a vCPU's operation: the old bytes, or `None` if it was not done and will not be.
    fn answered(&self, token: u32, old: Option<u128>);
}
