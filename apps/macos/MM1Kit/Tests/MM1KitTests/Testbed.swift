import Foundation
import Testing

@testable import MM1Kit

#if canImport(FoundationNetworking)
    import FoundationNetworking
#endif

/// The repository, three folders above the package.
private let root = URL(fileURLWithPath: #filePath)
    .deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()

/// A picture that comes with the embedded model.
func picture(_ name: String) throws -> Picture {
    try Picture(contentsOf: root.appendingPathComponent("mm1_mlx/tiny/\(name).png"))
}

/// An answer that goes on to the context's end unless it is stopped: token 1 ends others.
let endless = AnswerOptions(
    maxTokens: 900, temperature: 2, seed: 3, logitBias: [1: -100])

/// Options of a server whose lines stand in the test's output.
func options() -> MM1Server.Options {
    var options = MM1Server.Options()
    options.arguments = ["--no-log"]
    options.log = { FileHandle.standardError.write(Data("mm1: \($0)\n".utf8)) }
    return options
}

/// Waits until something holds, on a machine that may be busy.
func eventually(
    _ what: String, within limit: Duration = .seconds(300),
    isolation: isolated (any Actor)? = #isolation, _ holds: () async throws -> Bool
) async throws {
    let began = ContinuousClock.now
    while try await !holds() {
        try #require(ContinuousClock.now - began < limit, "not within \(limit): \(what)")
        try await Task.sleep(for: .milliseconds(20))
    }
}

/// The error of this type that is thrown.
func thrown<E: Error, T>(_: E.Type, by body: () async throws -> T) async throws -> E {
    var error: (any Error)?
    do { _ = try await body() } catch let caught { error = caught }
    return try #require(error as? E, "expected \(E.self), got \(String(describing: error))")
}

/// What the server says no with.
func refusal<T>(of body: () async throws -> T) async throws -> Refusal {
    let error = try await thrown(MM1Error.self, by: body)
    guard case .refused(let refusal) = error else { throw error }
    return refusal
}

/// A number of the server's `/metrics`, 0 where it is not counted yet.
func metric(_ name: String, _ client: MM1Client) async throws -> Double {
    var reply = try await Reply(.of(client.request("metrics")))
    let text = String(decoding: try await reply.rest(), as: UTF8.self)
    let line = text.split(separator: "\n").first { $0.hasPrefix(name + " ") }
    return try line.map { try #require(Double($0.dropFirst(name.count + 1))) } ?? 0
}

/// Takes connections at a free port of this machine, and never says a word.
final class Listener {
    let url: URL
    private let handle: Int32

    init() throws {
        #if canImport(Darwin)
            handle = socket(AF_INET, SOCK_STREAM, 0)
        #else
            handle = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        #endif
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_addr.s_addr = inet_addr("127.0.0.1")
        var length = socklen_t(MemoryLayout<sockaddr_in>.size)
        let handle = handle
        let failed = withUnsafeMutablePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                bind(handle, $0, length) != 0 || listen(handle, 8) != 0
                    || getsockname(handle, $0, &length) != 0
            }
        }
        try #require(!failed, "errno \(errno)")
        url = URL(string: "http://127.0.0.1:\(UInt16(bigEndian: address.sin_port))")!
    }

    deinit {
        close(handle)
    }
}

/// Whether a process is there.
func isAlive(_ pid: Int32) -> Bool {
    kill(pid, 0) == 0
}
