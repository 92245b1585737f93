//! Runs one build inside one microVM.
//!
//! ```text
//!   cli ─▶ daemon ─▶ frontend ─▶ scheduler ─▶ build ─▶ machine ──▶ guest-init, in the VM
//!                                   │           │ └──▶ devices ─▶ virtiofs     │
//!                                records        │                              │ vsock
//!                                               └◀─ outputs ◀─────────────────┘
//! ```
//!
//! Each module uses only those listed after it:
//!
//! | module | what it is |
//! |---|---|
//! | `cli` | the command line: arguments, printing, progress |
//! | `daemon` | configuration, start, systemd, drain |
//! | `frontend` | one folder for each protocol: from the wire to a submission and back |
//! | `scheduler` | the queue, active builds, and who may see or end them |
//! | `quota` | what each tenant may have in the store |
//! | `telemetry` | metrics and traces |
//! | `store_paths` | the store paths of Nix that each client has |
//! | `records` | builds that ended, and their logs |
//! | `build` | one build, from admission to result |
//! | `limits` | the limits of one build, as flags, settings and on the wire |
//! | `outputs` | the outputs as they arrive: check, scan, ingest |
//! | `devices` | the processes that serve a guest |
//! | `machine` | VMMs, the jail of helper processes, run directories |
//! | `oci` | images of OCI and Docker, from files and registries |
//! | `network` | which connections a build gets, and making them |
//! | `request` | the validated request and its digest |
//! | `tenants` | who has builds here, and what each may have |
//! | `disk` | the watermark of free disk space |
//! | `state` | the state directory, and the store in it |
//! | `text` | what an untrusted build has written, as characters |
//! | `privacy` | what keeps this process's memory from others |

mod build;
pub mod cli;
mod daemon;
pub mod devices;
mod disk;
mod frontend;
#[doc(hidden)]
pub mod fuzzing;
#[cfg(test)]
mod layering;
mod limits;
pub mod machine;
pub mod network;
mod niceness;
mod oci;
mod outputs;
mod privacy;
mod provenance;
mod quantity;
mod quota;
mod records;
pub mod request;
mod scheduler;
#[cfg(test)]
mod small_disk;
mod state;
mod store_paths;
mod telemetry;
mod tenants;
mod text;

pub use build::Settings;
