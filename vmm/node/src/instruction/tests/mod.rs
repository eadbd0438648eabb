//! Shipped instructions: every form compared with this CPU, walks of page tables with an oracle, whole
//! shipments, and random bytes.

mod encoding;
mod native;
mod processor;
mod random;
mod shipping;
mod walking;
