// Asks a model about pictures: mm1-ask QUESTION [PICTURE ...]
//
// The shortest program that starts a server, shows an answer as it is written and ends both.
import Foundation
import MM1Kit

func complain(_ line: String) {
    FileHandle.standardError.write(Data((line + "\n").utf8))
}

let arguments = CommandLine.arguments.dropFirst()
guard let question = arguments.first else {
    complain("usage: mm1-ask QUESTION [PICTURE ...]")
    exit(2)
}
do {
    let files = arguments.dropFirst().map { URL(fileURLWithPath: $0) }
    let pictures = try files.map { try Picture(contentsOf: $0) }
    var options = MM1Server.Options()
    options.arguments = ["--no-log"]
    options.log = complain
    let server = MM1Server(options)
    let client = try await server.start()
    for try await piece in client.stream([.user(question, pictures)]) {
        FileHandle.standardOutput.write(Data(piece.text.utf8))
    }
    print()
    await server.stop()
} catch {
    complain("error: \(error.localizedDescription)")
    exit(1)
}
