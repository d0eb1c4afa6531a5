//! The way from a guest's tap. What the guest sends to 169.254.169.254, by ARP or IPv4, is taken at
//! the tap's ingress, whatever its destination MAC and whatever the tap is plugged into, and led
//! into the room; what comes back from there goes out of the tap.
//!
//! ```text
//!            host                            │ room
//!  guest ── tap ─ tc ingress ─▶ spmN ════════╪═ vN ─ mN 169.254.169.254:80
//!            ▲                   │           │
//!            └── tc ingress ◀────┘           │
//! ```
//!
//! `mN` is a macvlan in passthru mode: it takes frames for any MAC, so a guest that knows only its
//! gateway is served too. The listener is bound to it: which guest asks is told by the wire alone.
//! Two guests with one address are two wires.
//!
//! Must never: change an address, a route or a setting of the host, or touch what others hang on
//! the tap. The number of our filters says whether their place (`clsact`) was ours too, so that a
//! daemon that starts anew restores what was there before the first one.

use std::net::{Ipv4Addr, SocketAddr};

use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use tokio::net::{TcpListener, TcpSocket};

use super::room::{WireError, feed, run};

/// Where every guest finds its metadata.
pub(super) const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const PORT: u16 = 80;
/// Connections that wait to be taken.
const BACKLOG: u32 = 64;
/// Filters for ARP and IPv4 when the tap's `clsact` is ours too.
const OURS: [u16; 2] = [11, 12];
/// The same when it was there before.
const GUESTS: [u16; 2] = [21, 22];

/// A wire from a tap into the room. It is taken down by [`Wire::remove`].
#[derive(Clone, Debug)]
pub(super) struct Wire {
    tap: String,
    number: u32,
}

impl Wire {
    /// The wire of this tap, not set up yet.
    pub(super) fn of(tap: &str) -> Result<Self, WireError> {
        // Asked of the kernel: /sys may be that of another namespace.
        let socket = socket_with(
            AddressFamily::INET,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        );
        let number = socket.and_then(|socket| name_to_index(socket, tap));
        let number = number.map_err(|errno| WireError::io("find the tap")(errno.into()))?;
        Ok(Self {
            tap: tap.to_owned(),
            number,
        })
    }

    fn host_end(&self) -> String {
        format!("spm{}", self.number)
    }

    /// In the room: makes the pair, and gives its end to the host.
    pub(super) fn make(&self) -> Result<(), WireError> {
        let (end, number, host) = (self.host_end(), self.number, std::process::id());
        // Of a tap that had this number before.
        let _ = run("ip", &["link", "delete", &format!("v{number}")]);
        let batch = format!(
            "link add {end} type veth peer name v{number}\n\
             link add m{number} link v{number} type macvlan mode passthru\n\
             address add {ADDRESS}/32 dev m{number}\n\
             link set v{number} up\n\
             link set m{number} up\n\
             link set {end} netns {host}\n"
        );
        feed("ip", &["-batch", "-"], &batch).map(drop)
    }

    /// In the room: listens on this wire and no other.
    pub(super) fn listen(&self) -> Result<TcpListener, WireError> {
        let what = "listen on a guest's wire";
        let socket = TcpSocket::new_v4().map_err(WireError::io(what))?;
        let device = format!("m{}", self.number);
        socket
            .bind_device(Some(device.as_bytes()))
            .and_then(|()| socket.bind(SocketAddr::from((ADDRESS, PORT))))
            .and_then(|()| socket.listen(BACKLOG))
            .map_err(WireError::io(what))
    }

    /// On the host: leads the tap's frames into the pair, and back.
    pub(super) fn lead(&self) -> Result<(), WireError> {
        let (end, tap) = (self.host_end(), &self.tap);
        let filters = run("tc", &["filter", "show", "dev", tap, "ingress"]).unwrap_or_default();
        let has_place = run("tc", &["qdisc", "show", "dev", tap])?.contains("clsact");
        // Left by a daemon before us; whose the place was is what it knew.
        let ours = filters.contains(&format!("pref {} ", OURS[0]));
        let prefs = if ours || !has_place { OURS } else { GUESTS };
        self.unhook(prefs);
        if !has_place {
            run("tc", &["qdisc", "add", "dev", tap, "clsact"])?;
        }
        // The host itself has nothing to say on it.
        let _ = run("ip", &["link", "set", &end, "addrgenmode", "none"]);
        run("ip", &["link", "set", &end, "up"])?;
        let [arp, ip] = prefs;
        let batch = format!(
            "qdisc add dev {end} clsact\n\
             filter add dev {end} ingress protocol all pref 1 u32 match u32 0 0 \
             action mirred egress redirect dev {tap}\n\
             filter add dev {tap} ingress protocol arp pref {arp} u32 \
             match u32 {address:#010x} 0xffffffff at 24 action mirred egress redirect dev {end}\n\
             filter add dev {tap} ingress protocol ip pref {ip} u32 \
             match ip dst {ADDRESS}/32 action mirred egress redirect dev {end}\n",
            address = u32::from(ADDRESS),
        );
        feed("tc", &["-batch", "-"], &batch).map(drop)
    }

    fn unhook(&self, prefs: [u16; 2]) {
        for pref in prefs {
            let pref = pref.to_string();
            let filter = [
                "filter", "delete", "dev", &self.tap, "ingress", "pref", &pref,
            ];
            // There may be none.
            let _ = run("tc", &filter);
        }
    }

    /// On the host: takes everything down, and leaves the tap as it was. A tap that is gone took its
    /// filters with it.
    pub(super) fn remove(&self) {
        let tap = &self.tap;
        let show = |what| run("tc", &["filter", "show", "dev", tap, what]).unwrap_or_default();
        let was_ours = show("ingress").contains(&format!("pref {} ", OURS[0]));
        self.unhook(OURS);
        self.unhook(GUESTS);
        let empty = show("ingress").trim().is_empty() && show("egress").trim().is_empty();
        if was_ours && empty {
            let _ = run("tc", &["qdisc", "delete", "dev", tap, "clsact"]);
        }
        let _ = run("ip", &["link", "delete", &self.host_end()]);
    }
}
