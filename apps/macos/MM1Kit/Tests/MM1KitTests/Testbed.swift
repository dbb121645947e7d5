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

/// Options of a server whose lines are shown where a test fails.
func options(_ lines: Lines = Lines()) -> MM1Server.Options {
    var options = MM1Server.Options()
    options.log = { lines.add($0) }
    return options
}

/// What a server said.
final class Lines: @unchecked Sendable {
    private let lock = NSLock()
    private var held: [String] = []

    var all: [String] { lock.withLock { held } }

    func add(_ line: String) {
        lock.withLock { held.append(line) }
    }
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

/// Whether a process is there.
func isAlive(_ pid: Int32) -> Bool {
    kill(pid, 0) == 0
}
