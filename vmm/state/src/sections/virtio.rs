//! Sections of virtio devices. The rules of the parent module hold.

use prost::Message;

/// The registers of a virtio device; the instance is its name in the machine. What its kind keeps
/// beside them is a section of the kind's own.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct VirtioMmio {
    /// Device type (virtio 1.2, section 5).
    #[prost(uint32, tag = "1")]
    pub device_type: u32,
    /// `DeviceFeaturesSel`.
    #[prost(uint32, tag = "2")]
    pub device_features_sel: u32,
    /// `DriverFeaturesSel`.
    #[prost(uint32, tag = "3")]
    pub driver_features_sel: u32,
    /// Features that the driver accepted.
    #[prost(uint64, tag = "4")]
    pub driver_features: u64,
    /// `QueueSel`.
    #[prost(uint32, tag = "5")]
    pub queue_sel: u32,
    /// `Status`, without NEEDS_RESET.
    #[prost(uint32, tag = "6")]
    pub status: u32,
    /// `InterruptStatus`.
    #[prost(uint32, tag = "7")]
    pub interrupt_status: u32,
    /// The device has failed and waits for a reset by its driver.
    #[prost(bool, tag = "8")]
    pub failed: bool,
    /// Its queues.
    #[prost(message, repeated, tag = "9")]
    pub queues: Vec<VirtioQueue>,
}

/// A queue of a virtio device.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct VirtioQueue {
    /// `QueueSize` as the driver wrote it.
    #[prost(uint32, tag = "1")]
    pub size: u32,
    /// `QueueReady`.
    #[prost(bool, tag = "2")]
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    #[prost(uint64, tag = "3")]
    pub desc: u64,
    /// Of the available ring.
    #[prost(uint64, tag = "4")]
    pub avail: u64,
    /// Of the used ring.
    #[prost(uint64, tag = "5")]
    pub used: u64,
    /// The device works with it.
    #[prost(bool, tag = "6")]
    pub open: bool,
    /// Requests taken so far, modulo 2^16.
    #[prost(uint32, tag = "7")]
    pub next_avail: u32,
    /// Requests given back so far, modulo 2^16.
    #[prost(uint32, tag = "8")]
    pub next_used: u32,
}

/// An entropy device. It keeps nothing; its section says that it is there.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct VirtioRng {}

/// A disk. What is in its image is not state: the image is handed on.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct VirtioBlk {
    /// Bytes of the disk as the guest knows it.
    #[prost(uint64, tag = "1")]
    pub size: u64,
    /// The cache is in write-back mode: what is written is durable after a flush, not before.
    #[prost(bool, tag = "2")]
    pub write_back: bool,
}

/// A socket device.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct VirtioVsock {
    /// Number of the next connection; none is used twice.
    #[prost(uint64, tag = "1")]
    pub next: u64,
    /// Host port from which on a free one is looked for.
    #[prost(uint32, tag = "2")]
    pub next_port: u32,
    /// Its connections, ordered by number.
    #[prost(message, repeated, tag = "3")]
    pub connections: Vec<VsockConnection>,
    /// Resets owed to the guest, oldest first.
    #[prost(message, repeated, tag = "4")]
    pub resets: Vec<VsockReset>,
}

/// A connection of a socket device.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct VsockConnection {
    /// Its number, by which its socket is lent.
    #[prost(uint64, tag = "1")]
    pub number: u64,
    /// How far it has come.
    #[prost(enumeration = "VsockStage", tag = "2")]
    pub stage: i32,
    /// Whether there is a socket; not so once its host program is gone.
    #[prost(bool, tag = "3")]
    pub socket: bool,
    /// What was read of the host program's first line.
    #[prost(bytes = "vec", tag = "4")]
    pub line: Vec<u8>,
    /// Host port.
    #[prost(uint32, tag = "5")]
    pub host_port: u32,
    /// Guest port.
    #[prost(uint32, tag = "6")]
    pub guest_port: u32,
    /// Bytes promised to the guest (`buf_alloc`).
    #[prost(uint32, tag = "7")]
    pub own_room: u32,
    /// Bytes that the host has taken, modulo 2^32 (`fwd_cnt`).
    #[prost(uint32, tag = "8")]
    pub consumed: u32,
    /// That, as the guest heard it last.
    #[prost(uint32, tag = "9")]
    pub told: u32,
    /// Bytes that the guest promised.
    #[prost(uint32, tag = "10")]
    pub guest_room: u32,
    /// Bytes that the guest's program has taken.
    #[prost(uint32, tag = "11")]
    pub guest_consumed: u32,
    /// Bytes sent to the guest.
    #[prost(uint32, tag = "12")]
    pub sent: u32,
    /// Taken from the guest, and not yet by the host's socket.
    #[prost(bytes = "vec", tag = "13")]
    pub for_host: Vec<u8>,
    /// What the guest won't do any more: 1 receive, 2 send.
    #[prost(uint32, tag = "14")]
    pub guest_shut: u32,
    /// What the host program won't do any more.
    #[prost(uint32, tag = "15")]
    pub host_shut: u32,
    /// That, as the guest was told.
    #[prost(uint32, tag = "16")]
    pub told_shut: u32,
    /// The guest asked for its credit and was not told yet.
    #[prost(bool, tag = "17")]
    pub owes_credit: bool,
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum VsockStage {
    /// Not known: a later release's.
    Unknown = 0,
    /// The host program's first line is being read.
    Greeting = 1,
    /// The guest is to be asked.
    Requesting = 2,
    /// The guest was asked.
    Requested = 3,
    /// The guest asked, and is to be told that it is connected.
    Answering = 4,
    /// Connected.
    Open = 5,
    /// The guest is through with it; the host has not read all.
    Lingering = 6,
}

/// A reset that a guest is owed.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct VsockReset {
    /// Context id in whose name.
    #[prost(uint64, tag = "1")]
    pub cid: u64,
    /// That side's port.
    #[prost(uint32, tag = "2")]
    pub host_port: u32,
    /// Guest port.
    #[prost(uint32, tag = "3")]
    pub guest_port: u32,
    /// Socket type.
    #[prost(uint32, tag = "4")]
    pub kind: u32,
}

/// A network device: what its guest can change, and what it was told at its boot.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct VirtioNet {
    /// MAC address, 6 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub mac: Vec<u8>,
    /// MTU in the configuration space; 0 if there is none.
    #[prost(uint32, tag = "2")]
    pub mtu: u32,
    /// Features offered: what the tap could do when the guest booted.
    #[prost(uint64, tag = "3")]
    pub offered: u64,
    /// Of those, what the driver agreed to.
    #[prost(uint64, tag = "4")]
    pub features: u64,
    /// `GUEST_*` features that are switched on; the tap is set so already.
    #[prost(uint64, tag = "5")]
    pub offloads: u64,
    /// Pairs of queues in use.
    #[prost(uint32, tag = "6")]
    pub active_pairs: u32,
    /// For each queue of the tap: a frame, header first, that was taken from it and had no room
    /// in the guest's buffers; as a rule empty.
    #[prost(bytes = "vec", repeated, tag = "7")]
    pub held: Vec<Vec<u8>>,
}
