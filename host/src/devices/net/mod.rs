//! The network of a VM, in user space.
//!
//! ```text
//!   host process                          device process, confined
//!   ┌─ server ────────────────┐           ┌─ backend ───────────────────────────────┐              ┌─ VMM ──┐
//!   │ asks the build's Broker │◀─ names, ─│ packet: what a frame is                 │◀─ net.sock ──│ guest  │
//!   │                         │  addresses│ flows: connections ⇄ stack, splice      │  vhost-user  │ kernel │
//!   │                         │── sockets▶│ dns: messages                           │              └────────┘
//!   └─────────────────────────┘           └─────────────────────────────────────────┘
//! ```
//!
//! The device starts without a build, with its machine. Until the build's [`Broker`](crate::network::Broker) is bound, see
//! [`Unbound`], nothing is asked of anybody, and a device that wants something is cut off.
//!
//! The device ends the guest's TCP in its own stack, and moves bytes between it and sockets that the host process has
//! connected. It can't make sockets or connect any, and a connected TCP socket can't be aimed elsewhere. So a guest that takes
//! the device over gains the connections that its build may have, and nothing else. Where a rate is set, the host process keeps the
//! TCP socket, gives the device a Unix socket, and carries the bytes between them.
//!
//! | of the guest | is |
//! |---|---|
//! | a TCP connection | held until the host process has connected, then accepted; else reset, or unreachable |
//! | a DNS query to the gateway, for A or AAAA | asked of the host process; other types have no records |
//! | an echo request to the gateway | answered |
//! | anything else | unreachable at once, or dropped; no more than 20,000 a second of these are taken |

mod allowance;
mod backend;
mod device;
mod dns;
mod events;
mod flows;
mod order;
mod packet;
mod questions;
mod rehearsal;
mod relay;
mod reply;
mod ring;
mod serve;
mod server;
mod socket;
mod splice;
mod stack;
mod stream_queries;
#[cfg(test)]
mod testing;
mod wire;

pub use device::Device;
pub(crate) use rehearsal::{answers, receive_all, serves, survives};
pub(super) use serve::run;
pub use server::{ServeError, Unbound};
pub use wire::NoRequest;
