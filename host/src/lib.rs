//! Runs one build inside one microVM.
//!
//! ```text
//!   request ──▶ build ──▶ vmm ───▶ guest-init, in the VM
//!                 │  └──▶ inputs ─▶ virtiofs      │
//!                 │                               │ vsock
//!                 └──◀ outputs ◀──────────────────┘
//! ```
//!
//! [`request`] is the only door for what clients send, [`build`] owns one build and its VM from admission to result,
//! [`vmm`] and [`jail`] know how processes are started and confined, [`inputs`] serves castore nodes over virtiofs, and
//! [`outputs`] takes in what the guest sends back. [`service`] runs builds for others, in the order that [`queue`] decides.

pub mod build;
pub mod cli;
pub mod failure;
#[doc(hidden)]
pub mod fuzzing;
pub mod inputs;
pub mod jail;
pub mod outputs;
pub mod paths;
pub mod queue;
pub mod records;
pub mod request;
pub mod service;
pub mod vmm;
