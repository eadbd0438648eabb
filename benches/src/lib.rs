//! Benches that compare Gestalt with a floor measured in the same run: absolute times say more about the host
//! than about us, the ratio of the two does not.
//!
//! - [`fault_path`]: what a page fault costs that another node must answer (`cargo bench -p benches --bench
//!   fault_path`).
//! - [`handover`]: what it costs that several nodes write one word (`cargo bench -p benches --bench
//!   handover`).
//! - [`fabric`]: round trips and throughput of the fabric beside bare sockets (`cargo bench -p benches
//!   --bench fabric`).
//! - [`direct`]: what it costs a device to read and overwrite memory of another node (`cargo bench -p benches
//!   --bench direct`).
//! - [`rdma`], [`perftest`]: the fabric over RDMA beside perftest (`cargo bench -p benches --bench rdma`).
//! - [`choice`]: what the command line asks for.
//! - [`place`]: which CPU and which priority a thread has while it is measured.
//! - [`report`]: the table on the terminal, the JSON file and its rows.
//! - [`plot`]: the picture of such a report.
//!
//! Reports go to `target/report` of the workspace.

pub mod choice;
pub mod direct;
pub mod fabric;
pub mod fault_path;
pub mod handover;
pub mod perftest;
pub mod place;
pub mod plot;
pub mod rdma;
pub mod report;
