//! Every form on this CPU, page tables against an oracle, whole shipments, and bytes that nobody thought of.

mod encoding;
mod native;
mod processor;
mod random;
mod shipping;
mod walking;
